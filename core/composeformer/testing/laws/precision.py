"""Laws of precision policies: products within the declared error, for any values, groups and dtypes.

Shapes: N rows, I inputs, O outputs, E groups.
"""

from functools import partial

import torch
from torch import Tensor

from composeformer import lazy
from composeformer.contracts import Implementation
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.maps import Bounded, Maps, near, serves_cpus
from composeformer.testing.subject import Subject

of_maps = partial(law, "precision", applies=serves_cpus)
# The longest sums, where a narrow accumulator shows.
LONG = (64, 129, 520, 1500)


@of_maps(
    "error",
    "outputs and every gradient are those of float64 within the declared error; rows of nobody are zeros",
    kills="scale-divides",
    examples=30,
)
def error(case: Case) -> None:
    maps = Maps(case)
    linear = maps.linear()
    wanted = maps.bounded(linear.dtype)
    for name, each in maps.run(linear).items():
        near(case, each, wanted[name], name)
    near(case, linear.matrix(), maps.bounded_matrix(), "the matrix")


@of_maps(
    "sums",
    "products of operands that need no rounding err by the declared rounding of sums alone",
    kills="sums-in-bfloat16",
    examples=20,
)
def sums(case: Case) -> None:
    """Numbers that are all of one magnitude have codes without an error in every format that has a sign. Those of every
    other feature are of one sign, too, so that sums grow with their length.
    """
    maps = Maps(case, groups=False, bias=False, content="even", inputs=LONG, rows=(3, 301))
    linear = maps.linear()
    # The sums of 301 such products are to be within float16.
    size = 2.0 ** case.integer("exponent", -6, 3 if maps.half else 6)
    x, g = (torch.where(each < 0, -size, size).to(each.dtype) for each in (maps.x, maps.cotangent))
    x[:, ::2] = g[:, ::2] = size
    found = maps.run(linear, x, g)
    m, x, g = linear.matrix().detach().double(), x.double(), g.double()
    r, out = maps.rounding, linear.dtype
    near(case, found["output"], maps.summed(x, m, out), "output")
    if "input" in found and r.turned == r.weight.turned:
        near(case, found["input"], maps.summed(g, m.mT, maps.x.dtype), "the gradient of the input")
    if "weight" in found:
        near(
            case, found["weight"], maps.summed(g.mT, x.mT, linear.weight.dtype), "the gradient of the weight"
        )


@of_maps(
    "bias",
    "a bias is added to its own rows, and its gradient is their sum, however many they are",
    kills="bias-sums-in-bfloat16",
    examples=12,
)
def bias(case: Case) -> None:
    """Gradients of one sign and size: a narrow sum stops where they are half of its last bit."""
    stacked = case.choice("stack", (True, True, False))
    maps = Maps(
        case,
        groups=stacked,
        bias=True,
        sensitive=False,
        content="even",
        rows=(601,),
        inputs=(16,),
        outputs=(16, 7),
    )
    linear = maps.linear()
    # The sums of 301 such products are to be within float16.
    size = 2.0 ** case.integer("exponent", -6, 3 if maps.half else 6)
    g = torch.where(maps.cotangent.isnan(), maps.cotangent, torch.full_like(maps.cotangent, size))
    found = maps.run(linear, torch.zeros_like(maps.x), g)
    shift = linear.bias.detach().double()
    wanted = torch.zeros_like(found["output"], dtype=torch.float64)
    for rows, own in maps.parts(maps.ends):
        wanted[rows] = shift[own]
        if "bias" in found:
            one = torch.ones(1, len(wanted[rows]), dtype=torch.float64)
            each = maps.summed(one, g[rows].double().mT, linear.bias.dtype)
            near(
                case,
                found["bias"][own],
                Bounded(exact=each.exact[0], bound=each.bound[0]),
                f"gradient of {own}",
            )
    unit = 2 * maps.rounding.result + torch.finfo(linear.dtype).eps
    near(case, found["output"], Bounded(exact=wanted, bound=unit * wanted.abs()), "outputs of zeros")


@of_maps(
    "groups",
    "each group's rows go through its own map, as if there were no other",
    kills="groups-share-scales",
    examples=20,
)
def groups(case: Case) -> None:
    maps = Maps(case, groups=True)
    linear = maps.linear()
    together, apart = maps.run(linear), maps.bounded(linear.dtype, same=True)
    for rows, own in maps.parts(maps.ends):
        shift = None if maps.bias_values is None else maps.bias_values[own]
        one = maps.linear(maps.weight_values[own], shift)
        alone = maps.run(one, maps.x[rows], maps.cotangent[rows], [])
        for name, each in alone.items():
            place = rows if name in ("output", "input") else own
            wanted = Bounded(exact=each.double(), bound=apart[name].bound[place])
            near(case, together[name][place], wanted, f"{name} of group {own}")


@of_maps(
    "foreign-groups",
    "no group's results depend on another's weights or rows",
    kills="groups-share-scales",
    examples=20,
)
def foreign_groups(case: Case) -> None:
    maps = Maps(case, groups=True)
    own = case.integer("own", 0, (maps.groups or 1) - 1)
    weight, x, g = maps.weight_values.clone(), maps.x.clone(), maps.cotangent.clone()
    rows, _ = list(maps.parts(maps.ends))[own]
    others = [n for n in range(len(weight)) if n != own]
    weight[others] *= 3
    for each in (x, g):
        each[: rows.start] *= -5
        each[rows.stop :] *= 7
    before = maps.run(maps.linear())
    after = maps.run(maps.linear(weight), x, g)
    for name, each in before.items():
        place = rows if name in ("output", "input") else own
        case.equal(after[name][place], each[place], f"{name} of group {own}")


@of_maps(
    "not-finite",
    "what is not finite is not hidden; what shares no scale with it stays right, what does is right or not finite",
    kills="infinity-spoils-its-block",
)
def not_finite(case: Case) -> None:
    _meets(case, confined=False)


@of_maps(
    "confined",
    "what is not finite is met where it is multiplied alone",
    kills="nan-is-a-scale",
    claimed=True,
)
def confined(case: Case) -> None:
    _meets(case, confined=True)


def _meets(case: Case, confined: bool) -> None:
    """NaN or an infinity in the input, and in the weight where it is stored plainly."""
    maps = Maps(case, groups=False, bias=False, rows=(2, 5, 33, 130))
    odd = case.choice("value", (torch.nan, torch.inf, -torch.inf))
    row, column = case.integer("row", 0, maps.number - 1), case.integer("column", 0, maps.declared.inputs - 1)
    maps.x[row, column] = 0
    x = maps.x.clone()
    x[row, column] = odd
    with torch.no_grad():
        y = maps.linear()(x)
    case.require(not y[row].isfinite().any(), f"a row with {odd} has finite outputs")
    block = None if confined else maps.rounding.activation.block[0]
    _beside(case, y, maps, row, block, f"rows beside one with {odd}")
    if maps.codec is not None:
        return
    output = case.integer("output", 0, maps.declared.outputs - 1)
    weight = maps.weight_values.clone()
    weight[output, column], maps.weight_values[output, column] = odd, 0
    with torch.no_grad():
        y = maps.linear(weight)(maps.x)
    met = maps.x[:, column] != 0
    case.require(not y[met, output].isfinite().any(), f"an output whose weight has {odd} is finite")
    block = None if confined else maps.rounding.weight.block[0]
    _beside(case, y, maps, output, block, f"outputs beside one with {odd}", dim=1)


def _beside(case: Case, y: Tensor, maps: Maps, odd: int, block: int | None, told: str, dim: int = 0) -> None:
    """All outputs but the odd row of them (or column, dim 1), which must be what they are without the odd number. In a
    `block` of so many rows, 0 for all, that shares a scale with it, they may be not finite.
    """
    wanted = maps.bounded(y.dtype)["output"]
    rest = torch.tensor([n for n in range(y.shape[dim]) if n != odd], dtype=torch.int64)
    found, exact, bound = (each.index_select(dim, rest) for each in (y.double(), wanted.exact, wanted.bound))
    if block is not None:
        size = block or y.shape[dim]
        shares = (rest // size == odd // size).unsqueeze(1 - dim)
        found = torch.where(shares & ~found.isfinite(), exact, found)
    near(case, found, Bounded(exact=exact, bound=bound), told)


@of_maps(
    "rows-alone",
    "a row's output and gradient are the same whatever rows stand beside it",
    kills="tiles-down-the-rows",
    claimed=True,
    examples=10,
)
def rows_alone(case: Case) -> None:
    maps = Maps(
        case, groups=False, rows=(2, 5, 33, 130), content=case.choice("mixed", ("wide", "blocks", "huge"))
    )
    linear = maps.linear()
    together, apart = maps.run(linear), maps.bounded(linear.dtype, same=True)
    start = case.integer("start", 0, maps.number - 1)
    picked = slice(start, start + case.integer("count", 1, 3))
    alone = maps.run(linear, maps.x[picked], maps.cotangent[picked])
    for name in alone.keys() & {"output", "input"}:
        wanted = Bounded(exact=alone[name].double(), bound=apart[name].bound[picked])
        near(case, together[name][picked], wanted, name)


@of_maps(
    "powers-of-two",
    "inputs, weights and gradients times powers of two give the same results times these, exactly",
    kills="smallest-scale-too-large",
    claimed=True,
    examples=10,
)
def powers_of_two(case: Case) -> None:
    content = case.choice("mixed", ("even", "wide", "blocks", "zeros", "integers"))
    maps = Maps(case, bias=False, content=content)
    if maps.half:
        case.draw.reject("float16 has too few exponents")
    one, two, three = (case.integer(f"exponent of {n}", -20, 20) for n in ("x", "weight", "gradient"))
    before = maps.run(maps.linear())
    scaled = maps.linear(maps.weight_values * 2.0**two)
    after = maps.run(scaled, maps.x * 2.0**one, maps.cotangent * 2.0**three)
    for name, power in (("output", one + two), ("input", three + two), ("weight", three + one)):
        if name in before:
            case.equal(after[name], before[name] * 2.0**power, name)


def judge_of(subject: Subject) -> Implementation:
    """The implementation that others are compared with: the reference, else the last."""
    offered = subject.component.implementations
    return next((each for each in offered if each.name == "reference"), offered[-1])


def has_another(subject: Subject) -> str | None:
    """Why there is nothing to compare an implementation with."""
    if subject.implementation.name == judge_of(subject).name:
        return "it is the implementation that others are compared with"
    return serves_cpus(subject)


@law(
    "precision",
    "implementations",
    "every implementation multiplies the same rounded operands, and differs from the reference by its sums alone",
    kills="half-to-odd",
    applies=has_another,
)
def implementations(case: Case) -> None:
    maps = Maps(case)
    judge = maps.linear(policy=lazy.load(judge_of(case.subject).module)(maps.config))
    linear = maps.linear()
    case.equal(linear.matrix().detach(), judge.matrix().detach(), "the matrix")
    found, wanted, apart = maps.run(linear), maps.run(judge), maps.bounded(linear.dtype, same=True)
    for name, each in wanted.items():
        near(case, found[name], Bounded(exact=each.double(), bound=apart[name].bound), name)
