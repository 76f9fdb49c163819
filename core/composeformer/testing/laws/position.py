"""Laws of positions: tables in fp32 that nothing casts, and a linear map of each head that can be undone.

Those of parts that rotate are beside this one: `rotary` says how, `frequencies` how fast.

Shapes: B rows, T tokens, H heads, D features of a head, R pairs that turn.
"""

import copy
from collections.abc import Sequence
from math import sqrt
from typing import Any

import attrs
import torch
from torch import Tensor

from composeformer.assemble import Builder, build
from composeformer.tensors import Rotary
from composeformer.testing.bounds import SAFETY, roundoff, size
from composeformer.testing.case import Case
from composeformer.testing.law import law

# Positions that fp32 holds exactly, their multiples by a frequency rounded.
FARTHEST = 2**18
SINGLE = roundoff(torch.float32)
# Of a sine or cosine in fp32, its argument aside: two units in the last place, as vector libraries have it.
TRIGONOMETRY = 4 * SINGLE


def positions(case: Case, tokens: int = 7) -> Tensor:
    """Positions (1, T), near and far, the first among them."""
    drawn = case.integers("positions", 0, 3 * tokens, tokens, tokens)
    far = case.integers("far", 0, 18, tokens, tokens)
    return torch.tensor([[0, 1, *((1 << power) - 1 + near for near, power in zip(drawn, far, strict=True))]])


def heads(case: Case, label: str, tables: Rotary, dtype: torch.dtype | None = None) -> Tensor:
    """Heads (B, T, H, D) for tables (B, T, R)."""
    return case.normal(label, *tables.cos.shape[:2], 2, case.node.site.width, dtype=dtype)


def radius(tables: Rotary) -> Tensor:
    """What the tables scale each pair by (B, T, R), in float64."""
    return (tables.cos.double().square() + tables.sin.double().square()).sqrt()


def amplitude(tables: Rotary) -> float:
    """What the tables are scaled by, at most; 1 for those without a pair."""
    return size(radius(tables)) if tables.cos.numel() else 1.0


def undone(tables: Rotary, x: Tensor, dtype: torch.dtype) -> float:
    """How far x may be from itself turned there and back: the way back enlarges what the way there shrank, and fp32
    tables lie on their circle but for rounding.
    """
    shrunk = max(1.0, 1 / float(radius(tables).min())) if tables.cos.numel() else 1.0
    return 2 * (1 + sqrt(2) * shrunk) * rounding(tables, x, dtype) + 4 * TRIGONOMETRY * size(x)


def rounding(tables: Rotary, x: Tensor, dtype: torch.dtype) -> float:
    """How far two right rotations of x may be apart that compute in fp32 at least, and give `dtype`."""
    wide = roundoff(torch.promote_types(dtype, torch.float32))
    return (SAFETY * wide + 2 * roundoff(dtype)) * sqrt(2) * max(1.0, amplitude(tables)) * size(x)


@law(
    "position",
    "tables-in-fp32",
    "tables are fp32 and the same bits after any cast, a meta build, and in a model of any dtype",
    kills="rope-frequencies-cast-with-the-model",
    examples=8,
)
def tables_in_fp32(case: Case) -> None:
    at, part = positions(case), case.part
    wanted = part(at)
    for name, table in zip(Rotary._fields, wanted, strict=True):
        case.equal(table.dtype, torch.float32, f"the dtype of {name}")
        case.require(
            table.shape[:-1] == at.shape,
            f"{name} has shape {tuple(table.shape)} for positions (1, {at.shape[1]})",
        )
        case.finite(table, name)
    case.equal(wanted.cos.shape, wanted.sin.shape, "the shapes of cos and sin")
    others = {
        "a second time": part,
        "after a cast to bfloat16": copy.deepcopy(part).bfloat16(),
        "after casts to float16 and float64": copy.deepcopy(part).half().double(),
        "in a model that was cast": case.part_of(copy.deepcopy(case.model).to(torch.bfloat16)),
        "after to_empty": copy.deepcopy(part).to_empty(device="cpu"),
        "of a model on the meta device": case.part_of(build(case.spec, device="meta")),
        "of the model in float64": case.part_of(case.judge),
    }
    for told, other in others.items():
        for name, found, table in zip(Rotary._fields, other(at), wanted, strict=True):
            case.equal(found, table, f"{name} {told}")


@law(
    "position",
    "each-position-alone",
    "a position's tables depend on it alone, not on the others nor on their number",
    kills="rope-stretched-by-what-it-sees",
    examples=8,
)
def each_position_alone(case: Case) -> None:
    at = positions(case)
    one = case.integer("one", 0, at.shape[1] - 1)
    whole, alone = case.part(at), case.part(at[:, one : one + 1])
    # The angle is the same product; a vector unit may take another path to its cosine.
    bound = 2 * TRIGONOMETRY * amplitude(whole)
    for name, found, table in zip(Rotary._fields, alone, whole, strict=True):
        case.within(gap_of(found, table[:, one : one + 1]), bound, f"{name} of a position by itself")


def gap_of(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, NaN as infinite."""
    if not wanted.numel():
        return 0.0
    return float((found.double() - wanted.double()).abs().nan_to_num(nan=torch.inf).max())


@law(
    "position",
    "linear",
    "turning is linear, each token and head alone, in the dtype of the heads and computed in fp32 at least",
    kills="rope-tables-cast-to-the-heads",
    examples=10,
)
def linear(case: Case) -> None:
    tables = case.part(positions(case))
    dtype: torch.dtype = getattr(torch, case.choice("of", ("bfloat16", "float32", "float64")))
    x, y = heads(case, "x", tables, dtype), heads(case, "y", tables, dtype)
    one = case.integer("one", 0, x.shape[1] - 1)

    def turned(z: Tensor, at: Rotary = tables) -> Tensor:
        found: Tensor = case.part.rotate(z, at)
        return found

    found = turned(x)
    case.equal(found.dtype, x.dtype, "the dtype of turned heads")
    case.equal(found.shape, x.shape, "their shape")
    spoilt = torch.full_like(x, torch.nan)
    spoilt[:, one, 1] = x[:, one, 1]
    case.equal(turned(spoilt)[:, one, 1], found[:, one, 1], "a head beside others that are NaN")
    exact = turned(x.double())
    # Rounded once, at the end.
    beyond = (found.double() - exact).abs() - 1.01 * roundoff(dtype) * exact.abs()
    wide = roundoff(torch.promote_types(dtype, torch.float32))
    bound = SAFETY * wide * max(1.0, amplitude(tables)) * size(x)
    case.within(size(beyond.clamp(min=0).nan_to_num(nan=torch.inf)), bound, "against heads in float64")
    case.within(
        gap_of(turned(x.double() - 3 * y.double()), exact - 3 * turned(y.double())),
        rounding(tables, 4 * torch.maximum(x.abs(), y.abs()), torch.float64),
        "a sum, turned, against the sum of what was turned",
    )


@law(
    "position",
    "inverse",
    "what was turned, turned back, is what it was; its gradient is the transposed map's",
    kills="rope-inverse-keeps-the-scale",
    examples=8,
)
def inverse(case: Case) -> None:
    tables = case.part(positions(case))
    x, y = heads(case, "x", tables), heads(case, "y", tables).double()
    there = case.part.rotate(x, tables)
    back = case.part.rotate(there, tables, inverse=True)
    case.equal(back.dtype, x.dtype, "the dtype of what is turned back")
    case.within(gap_of(back, x), undone(tables, x, x.dtype), "turned there and back")
    exact = x.double()
    found = case.gradients(case.model, lambda z: case.part.rotate(z, tables), exact, y)
    told = "the products of what is turned with y, and of what is not with the gradient for y"
    bound = rounding(tables, exact, torch.float64) * size(y) * x.numel()
    case.within(gap_of((exact * found["input"]).sum(), (found["output"] * y).sum()), bound, told)


@law(
    "position",
    "any-width",
    "a width that can not be turned is refused on paper; any other one can",
    kills="rope-of-an-odd-width",
    examples=8,
)
def any_width(case: Case) -> None:
    width = case.integer("width", 1, 13)
    site = attrs.evolve(case.node.site, width=width)
    if list(case.config.validate(site)):
        return
    node = attrs.evolve(case.node, site=site)
    part: Any = Builder(case.spec, "cpu").module(node)
    tables: Rotary = part(positions(case))
    x = case.normal("x", *tables.cos.shape[:2], 1, width, dtype=torch.float64)
    there = part.rotate(x, tables)
    case.equal(there.shape, x.shape, f"the shape of heads of {width} features, turned")
    back = part.rotate(there, tables, inverse=True)
    case.within(
        gap_of(back, x), undone(tables, x, torch.float32), f"heads of {width} features, turned there and back"
    )


@law(
    "position",
    "own-tables",
    "where parts of a model have several positions, each reads its own tables",
    kills="rope-tables-under-one-name",
    examples=6,
)
def own_tables(case: Case) -> None:
    from composeformer.testing.tables import tables

    other = case.draw("other", tables(case.subject.component))
    (path, *_) = case.node.part.paths
    data = copy.deepcopy(case.data)
    if path[:2] != ("layers", 0):
        case.draw.reject("the part stands in no layer")
    first = data["layers"][0]
    second = copy.deepcopy(first)
    put(second, path[2:], {**other, "implementation": case.subject.implementation.name})
    model = build(case.spec_of({**data, "layers": [first, second, first]}), seed=0)
    at = positions(case)[:, :4]
    found = model.rotary(at)
    names = ".".join(str(each) for each in case.node.path.split(".")[2:])
    for index, layer in enumerate(model.layers):
        part: Any = layer.get_submodule(names)
        for name, table, own in zip(Rotary._fields, found[part.key], part(at), strict=True):
            case.equal(table, own, f"{name} that layer {index} reads")


def put(table: Any, path: Sequence[str | int], value: Any) -> None:
    """Sets what stands at a path."""
    *above, last = path
    for each in above:
        table = table[each]
    table[last] = value
