"""Laws that positions claim which rotate: how pairs of features turn, and that only distances count.

    (a, b) -> (a cos t - b sin t, b cos t + a sin t)        arXiv 2104.09864, equation 34

With c = cos + i sin of a pair's tables, `relative` says c(i) conj(c(j)) = |c| c(i - j). All of it follows from angles
that are multiples of the position: an origin where nothing turns, scores that know i - j alone, far away too.

Shapes: B rows, T tokens, H heads, D features of a head, R pairs that turn.
"""

from math import log

import torch
from torch import Tensor

from composeformer.tensors import Rotary
from composeformer.testing.bounds import size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.position import (
    FARTHEST,
    SINGLE,
    TRIGONOMETRY,
    amplitude,
    gap_of,
    heads,
    positions,
    radius,
    rounding,
)


def turns(tables: Rotary) -> Tensor:
    """Each pair's number cos + i sin (B, T, R), complex."""
    return torch.complex(tables.cos.double(), tables.sin.double())


def pair_order(case: Case, pairs: int) -> tuple[Tensor, Tensor]:
    """Where the first and the second feature of each pair stand, as the field `layout` says: halves without one."""
    r = torch.arange(pairs)
    if getattr(case.config, "layout", "half-split") == "interleaved":
        return 2 * r, 2 * r + 1
    return r, r + pairs


@law(
    "position",
    "relative",
    "the turn of a pair between two positions is that of their distance, however far they are",
    kills="rope-positions-in-half-precision",
    claimed=True,
    examples=12,
)
def relative(case: Case) -> None:
    j, distance = case.integer("j", 0, FARTHEST), case.integer("distance", 0, FARTHEST)
    i = j + distance
    c = turns(case.part(torch.tensor([[i, j, distance, 1]])))[0]
    scale = float(c.abs().max())
    # Each angle is a multiple of one fp32 frequency, rounded; the frequency is at most the turn at 1, or in a table
    # of a first position that is no position, pi.
    frequency = c[3].angle().abs() * (1 + 4 * TRIGONOMETRY) + TRIGONOMETRY
    angles = 2 * i * frequency * SINGLE
    bound = scale**2 * (angles + 4 * TRIGONOMETRY)
    error = (c[0] * c[1].conj() - c[2] * c[2].abs()).abs()
    worst = int((error / bound).argmax())
    told = f"the turn from {j} to {i} of pair {worst} against that at {distance}"
    case.within(float(error[worst]), float(bound[worst]), told)


@law(
    "position",
    "scores",
    "scores of turned queries and keys depend on the distance alone",
    kills="rope-turns-keys-and-queries-apart",
    claimed=True,
    examples=8,
)
def scores(case: Case) -> None:
    near = case.integers("near", 0, 40, 2, 2)
    shift = case.integer("shift", 0, 4000)
    at = torch.tensor([[*near, near[0] + shift, near[1] + shift]])
    tables = case.part(at)
    q, k = (heads(case, label, tables, torch.float64)[:, :1] for label in "qk")
    rotated = [case.part.rotate(x.expand(-1, 4, -1, -1), tables) for x in (q, k)]
    found = (rotated[0][0, 2] * rotated[1][0, 3]).sum(-1)
    wanted = (rotated[0][0, 0] * rotated[1][0, 1]).sum(-1)
    fastest = float(turns(case.part(torch.tensor([[1]]))).angle().abs().max())
    angles = 4 * int(at.max()) * fastest * SINGLE + 8 * TRIGONOMETRY
    # Cauchy and Schwarz: each of the two rotations moves its head by no more than the angle's error.
    bound = 2 * angles * amplitude(tables) ** 2 * float(q.norm() * k.norm())
    case.within(gap_of(found, wanted), bound, f"scores {shift} tokens later")


@law(
    "position",
    "rotation",
    "pairs turn from the first feature towards the second; layout says which are pairs, fraction how many turn",
    kills="rope-layouts-mixed-up",
    claimed=True,
    examples=12,
)
def rotation(case: Case) -> None:
    tables = case.part(positions(case))
    x = heads(case, "x", tables)
    pairs, width = tables.cos.shape[-1], x.shape[-1]
    wanted_pairs = int(width * getattr(case.config, "fraction", 1.0)) // 2
    case.equal(pairs, wanted_pairs, f"the pairs of {width} features that turn")
    first, second = pair_order(case, pairs)
    cos, sin = (table.double()[:, :, None] for table in tables)
    for back in (False, True):
        scale = radius(tables)[:, :, None].square() if back else torch.ones(())
        sine = -sin if back else sin
        found, wanted = case.part.rotate(x, tables, inverse=back), x.double().clone()
        a, b = wanted[..., first], wanted[..., second]
        wanted[..., first], wanted[..., second] = (a * cos - b * sine) / scale, (b * cos + a * sine) / scale
        least = min(1.0, float(radius(tables).min()))
        bound = rounding(tables, x, x.dtype) / least**2 + back * 4 * TRIGONOMETRY * size(x) / least
        told = "heads, turned back" if back else "heads, turned"
        case.equal(
            found[..., 2 * pairs :], x[..., 2 * pairs :], f"the features behind those that are {told[7:]}"
        )
        case.within(gap_of(found, wanted), bound, told)


@law(
    "position",
    "still",
    "nothing turns: heads are the same bits at every position",
    kills="none-turns-all-the-same",
    claimed=True,
    examples=5,
)
def still(case: Case) -> None:
    tables = case.part(positions(case))
    x = heads(case, "x", tables)
    for back in (False, True):
        case.equal(case.part.rotate(x, tables, inverse=back), x, "heads")


def frequency_error(theta: float, magnified: Tensor) -> Tensor:
    """The relative error of fp32 angles: of theta to a power whose exponent is rounded, `magnified` by what is made of
    it, of as many operations as that takes, and of the product with the position.
    """
    return (magnified * (log(theta) + 8) + 8) * SINGLE
