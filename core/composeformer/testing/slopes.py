"""Whether gradients are the derivatives of what is computed: along a random direction, by central differences.

    D(h) = (f(+h) - f(-h)) / 2h = f' + O(h^2)       D* = (4 D(h) - D(2h)) / 3 = f' + O(h^4)

|D(2h) - D(h)| is three times what D(h) leaves out, and far above what D* does; where a choice turns or an activation
has its corner within the step, it is of the size of that. To it comes the rounding of f, divided by the step.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from composeformer.testing.case import SEEDS, Case

# Of float64 differences: about where what is left out and what is rounded are alike.
STEP = 2.0**-16


def differences(case: Case, terms: Callable[[Tensor], Tensor], x: Tensor, told: str) -> None:
    """The derivative of a sum, of `terms(x)` that the judge computes, by its gradients and by differences.

    All is in float64: x and every parameter of the judge move, each element by a random part of itself.
    """
    judge = case.judge
    generator = torch.Generator().manual_seed(case.draw("direction", SEEDS))
    entered = x.detach().clone().requires_grad_()
    tensors = [entered, *(p for p in judge.parameters() if p.requires_grad)]
    result = terms(entered)
    joined = result.sum() + entered[..., :0].sum()
    found = torch.autograd.grad(joined, tensors, allow_unused=True)
    kept = [each.detach().clone() for each in tensors]
    ways = [each * torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in kept]
    gradients = [torch.zeros_like(each) if g is None else g for g, each in zip(found, kept, strict=True)]
    exact = sum(float((g * way).sum()) for g, way in zip(gradients, ways, strict=True))

    def at(step: float) -> float:
        with torch.no_grad():
            for each, start, way in zip(tensors, kept, ways, strict=True):
                each.copy_(start + step * way)
            return float(terms(entered).sum())

    near, far = ((at(n * STEP) - at(-n * STEP)) / (2 * n * STEP) for n in (1, 2))
    at(0.0)
    # What is rounded: the terms, and within them what a relative change of all that enters would change.
    moved = sum(float((g * start).square().sum()) for g, start in zip(gradients, kept, strict=True))
    rounded = case.terms.plus(x.numel()).error(torch.float64) * (
        float(result.detach().abs().sum()) + sqrt(moved)
    )
    case.within(abs((4 * near - far) / 3 - exact), abs(far - near) + rounded / STEP, told)
