"""Initial values: each tensor, and each group of one, draws from (seed, name, group) alone.

So the same seed gives the same weights at any layout: a process that holds some layers, or some experts,
draws just those. Values are drawn in fp32 on the CPU and then cast.
"""

from hashlib import blake2b
from math import prod

import attrs
import torch
from torch import Tensor

from composeformer.contracts import Constant, Normal, Weight
from composeformer.errors import InputError


def initial(
    name: str, weight: Weight, seed: int, default_std: float, groups: slice | None = None
) -> Tensor:
    """The initial value of a declared tensor, on the CPU: fp32, or its own dtype when that is no float.

    A tensor that states no `init` is normal with `default_std`; three dimensions are groups. With `groups` only
    those are drawn, the same as among all. Raises InputError for one that is too large for this machine, before
    any is drawn.
    """
    start = 0
    if groups is not None:
        start = groups.start
        weight = attrs.evolve(weight, shape=(groups.stop - start, *weight.shape[1:]))
    init = weight.init if weight.init is not None else Normal(default_std)
    if isinstance(init, Constant):
        dtype = {"int64": torch.int64, "bool": torch.bool}.get(weight.dtype or "", torch.float32)
        return torch.full(weight.shape, init.value, dtype=dtype)
    value = _empty(name, weight.shape)
    if value.ndim == 3:
        for group, part in enumerate(value, start):
            _draw(part, init.std, f"{seed}/{name}/{group}")
    else:
        _draw(value, init.std, f"{seed}/{name}")
    return value


def _empty(name: str, shape: tuple[int, ...]) -> Tensor:
    try:
        # The default dtype is the process's; a seed must not depend on it.
        return torch.empty(shape, dtype=torch.float32)
    except RuntimeError:
        told = f"{4 * prod(shape):,} bytes are more than this machine can allocate"
        raise InputError(f"{name}: {told}; on the device `meta` a model has shapes only") from None


def _draw(value: Tensor, std: float, key: str) -> None:
    number = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
    value.normal_(0.0, std, generator=torch.Generator().manual_seed(number))
