"""How one tensor is related to another of its shape: in another order, scaled, shifted, transposed, or not at all.

A relation is told only where it makes the two equal to within the rounding of the dtype that they were stored in:
orders and transpositions are exact in any dtype, a scale costs each element one rounding on either side.
"""

from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

# Of a vector's two elements anything is a scale or a shift; a relation must hold for more than it has freedom.
FEWEST = 3
SAMPLE = 4096
# Sums of the same numbers in another order, in double precision.
SAME_SUM = 1e-9


@attrs.frozen(kw_only=True)
class Relation:
    """What the first tensor is of the second: a `sort` of relation, in words, and the number in it, if any."""

    sort: str
    told: str
    factor: float | None = None


def relation(a: Tensor, b: Tensor, eps: float) -> Relation | None:
    """The relation of `a` to `b`, of one shape; `eps` is the spacing of the dtype that they were stored in."""
    if a.numel() < FEWEST or not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        return None
    return next(_relations(a, b, eps), None)


def _relations(a: Tensor, b: Tensor, eps: float) -> Iterator[Relation]:
    # Most tensors are not related, and are large: what can be seen of a few elements or of a sum is looked at first.
    if abs(energy(a) - energy(b)) <= SAME_SUM * energy(b):
        for dim in range(a.ndim):
            order = permutation(a, b, dim)
            if order is not None:
                what = _dimension(a.ndim, dim)
                yield Relation(sort=f"order {dim}", told=f"{what} in another order, {_listed(order)}")
        if a.ndim > 1 and a.shape[-1] == a.shape[-2] and torch.equal(a.mT, b):
            yield Relation(sort="transposed", told="transposed")
    factor, shift = _scale(sample(a), sample(b)), float((sample(a) - sample(b)).mean())
    # The samples' own rounding is in the factor that they give.
    if factor and alike(sample(a), factor * sample(b), 2 * eps):
        a, b = a.double(), b.double()
        factor = _scale(a, b)
        if alike(a, factor * b, eps):
            yield Relation(sort="scale", told=f"{factor:.6g} times as large", factor=factor)
    elif shift and _shifted(sample(a), sample(b), shift, 2 * eps):
        a, b = a.double(), b.double()
        shift = float((a - b).mean())
        if _shifted(a, b, shift, eps):
            yield Relation(sort="shift", told=f"with {shift:.6g} added", factor=shift)


def sample(tensor: Tensor) -> Tensor:
    """A few thousand elements from all over a tensor, in double precision."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)].double()


def energy(tensor: Tensor) -> float:
    """The sum of squares, which no order changes."""
    return float(tensor.double().square().sum())


def _scale(a: Tensor, b: Tensor) -> float:
    """The factor by which `a` is nearest to `b`."""
    return float((a * b).sum() / (b * b).sum()) if bool(b.any()) else 0.0


def alike(a: Tensor, b: Tensor, eps: float) -> bool:
    """Whether each element is the other one's to within a rounding of both."""
    return bool(((a - b).abs() <= eps * torch.maximum(a.abs(), b.abs())).all())


def _shifted(a: Tensor, b: Tensor, shift: float, eps: float) -> bool:
    """Each side was rounded where it stands, at a size of its own."""
    return bool(((a - b - shift).abs() <= eps * (a.abs() + b.abs())).all())


def permutation(a: Tensor, b: Tensor, dim: int) -> list[int] | None:
    """The order in which `a` holds the slices of `b` along `dim`: a's i-th is b's `order[i]`; None if it does not."""
    rows, others = (x.movedim(dim, 0).reshape(x.shape[dim], -1).contiguous().numpy() for x in (a, b))
    if len(rows) < 2:
        return None
    places: dict[int, list[int]] = {}
    for index in reversed(range(len(others))):
        places.setdefault(hash(others[index].tobytes()), []).append(index)
    order = []
    for row in rows:
        held = places.get(hash(row.tobytes()))
        if not held:
            return None
        order.append(held.pop())
    # Hashes may meet by chance.
    return order if torch.equal(a, b.index_select(dim, torch.tensor(order))) else None


def _dimension(ndim: int, dim: int) -> str:
    if ndim == 1:
        return "its features"
    return {1: "its inputs", 2: "its outputs"}.get(ndim - dim, "its groups")


def _listed(order: Sequence[int]) -> str:
    shown = ", ".join(str(index) for index in order[:6])
    return f"{shown}{', ...' if len(order) > 6 else ''}"
