"""The norm of all gradients together, and clipping by it. A shared tensor is one parameter, counted once."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


@torch.no_grad()
def global_norm(parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The 2-norm of all gradients, in fp32 or wider; zero where there are none."""
    norms = [
        torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.grad.dtype, torch.float32))
        for p in parameters
        if p.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: Float[Tensor, ""], largest: float) -> None:
    """Scales all gradients, whose norm is `norm`, so that it is at most `largest`."""
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
