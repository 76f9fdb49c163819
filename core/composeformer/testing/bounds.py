"""How far two right computations of the same thing may be apart.

The standard model of rounding: each operation is exact but for a relative error of at most u, the unit roundoff.
Those of n operations on random numbers add up to a multiple of sqrt(n) u (Higham and Mary, SIAM J. Sci. Comput. 41,
A2815, 2019). What they make of a result depends on the case: its condition, the largest change of the result for a
relative change of everything that enters it, measured in float64 in random directions. The bound is the product.

Sums are accumulated in float32 or wider whatever the dtype; every stage rounds its result to the dtype.
"""

from collections.abc import Mapping
from math import sqrt

import attrs
import torch
from torch import Tensor

from composeformer.plan import Node

# Standard deviations: of the sum of roundings, and of the condition, of which random directions find a typical value.
SAFETY = 8.0
# Elementwise stages between two linear maps, at most: a norm, a rotation, a softmax, a product.
STAGES = 8
# Of the largest tensor of a set (all gradients of a part), what the smallest is held to: terms that cancel exactly.
FLOOR = 0.1


def roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Whichever of two dtypes rounds more."""
    return a if roundoff(a) > roundoff(b) else b


@attrs.frozen(kw_only=True)
class Terms:
    """What a computation is made of: how many `terms` its sums have together, and how many `stages` round."""

    terms: int
    stages: int

    def error(self, dtype: torch.dtype) -> float:
        """The relative error of a result of condition 1."""
        sums = roundoff(torch.float64 if dtype == torch.float64 else torch.float32)
        return SAFETY * (sqrt(self.terms) * sums + sqrt(self.stages) * roundoff(dtype))

    def plus(self, terms: int) -> "Terms":
        """With further terms: the keys that a query sees, the tokens that a gradient sums over."""
        return Terms(terms=self.terms + terms, stages=self.stages)


def terms_of(*nodes: Node) -> Terms:
    """Of parts with all that is in them: a result passes through each linear map at most once."""
    linears = [linear for node in nodes for each in node.walk() for linear in each.linears.values()]
    widths = [each.site.width for node in nodes for each in node.walk()]
    groups = sum(linear.active_groups for linear in linears if linear.groups is not None)
    return Terms(
        terms=sum(linear.inputs + linear.outputs for linear in linears) + sum(widths) + groups,
        stages=STAGES * (1 + len(widths)) + 2 * len(linears),
    )


def gap(found: Tensor, wanted: Tensor) -> float:
    """max |a - b|; infinite where only one of them is finite. Shapes are the caller's business."""
    if not wanted.numel():
        return 0.0
    a, b = found.detach().to(torch.float64), wanted.detach().to(torch.float64)
    difference = (a - b).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(difference.masked_fill(same, 0).nan_to_num(nan=torch.inf).max())


def size(tensors: Tensor | Mapping[str, Tensor]) -> float:
    """The largest magnitude in a tensor, or in any of several."""
    each = [tensors] if isinstance(tensors, Tensor) else list(tensors.values())
    return max((float(one.detach().abs().max()) for one in each if one.numel()), default=0.0)
