"""Maps that hold codes and scales: a cast of the model they are in leaves these as they are."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Kept(nn.Module):
    """A module whose buffers are moved by `to`, `half` and the like, and never cast: codes are no numbers without their
    scales, and scales that were rounded would be other weights.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
