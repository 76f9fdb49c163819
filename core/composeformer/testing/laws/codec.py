"""Laws of codecs: what is stored is what was declared, decodes within the declared error, and can be cut anywhere.

Shapes: E groups, O outputs, I inputs; a slice of rows is one of outputs.
"""

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from composeformer import lazy
from composeformer.contracts import Weight
from composeformer.errors import ComposeError
from composeformer.rounding import Operand
from composeformer.tensors import DTYPES
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.maps import Bounded, near, operand_error

ROWS = (1, 2, 31, 33, 127, 128, 129, 260)
COLUMNS = (1, 2, 31, 33, 127, 128, 129, 300)
CONTENTS = ("even", "wide", "blocks", "huge", "zeros", "tiny", "integers")
# Of more blocks than one, at most 128 long.
SEVERAL = (5, 129, 200, 300)
# So many elements may be decoded in more steps than one.
WIDE = 1100
OUT = ("float32", "bfloat16", "float64")


class Coded:
    """A value of a case, (O, I) or (E, O, I), and the codec that is tried on it."""

    def __init__(
        self,
        case: Case,
        stacked: bool | None = None,
        rows: Sequence[int] = ROWS,
        columns: Sequence[int] = COLUMNS,
    ) -> None:
        self.case = case
        # Formats name a codec by its kind alone: it has its defaults.
        self.config: Any = case.subject.component.config()
        self.codec = lazy.load(case.subject.implementation.module)(self.config)
        lengths = case.choice("rows", rows), case.choice("columns", columns)
        stacked = case.boolean("stacked") if stacked is None else stacked
        self.shape: tuple[int, ...] = (case.integer("groups", 1, 3), *lengths) if stacked else lengths
        self.value = self._content(case.choice("content", CONTENTS))
        self.weight = Weight(name="layers.0.ffn.up.weight", shape=self.shape)

    def _content(self, sort: str) -> Tensor:
        x = self.case.normal("value", prod(self.shape[:-1]), self.shape[-1], dtype=torch.float32)
        generator = torch.Generator().manual_seed(self.case.draw.values["value"] + 1)
        if sort == "wide":
            x = x * torch.exp2(torch.randint(-30, 31, x.shape, generator=generator).float())
        elif sort == "blocks":
            number = x.shape[0] // 32 + 1, x.shape[1] // 32 + 1
            powers = torch.randint(-12, 13, number, generator=generator).float().exp2()
            x = x * powers.repeat_interleave(32, 0)[: x.shape[0]].repeat_interleave(32, 1)[:, : x.shape[1]]
        elif sort == "huge":
            x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = 1e30
        elif sort == "zeros":
            x[:, torch.rand(x.shape[1], generator=generator) < 0.5] = 0
            x[: max(1, x.shape[0] // 2)] = 0
        elif sort == "tiny":
            x = x * 2.0**-130
        elif sort == "integers":
            x = torch.randint(-8, 9, x.shape, generator=generator).float()
        return x.view(self.shape)

    @cached_property
    def parts(self) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.codec.encode(self.value)
        return found

    @cached_property
    def decoded(self) -> Tensor:
        """In fp32."""
        found: Tensor = self.codec.decode(self.parts)
        return found

    @cached_property
    def names(self) -> list[str]:
        return [
            each.name.removeprefix(self.weight.name) or "codes" for each in self.config.stored(self.weight)
        ]


@law("codec", "error", "a value comes back within the declared error", kills="decode-divides", examples=20)
def error(case: Case) -> None:
    coded = Coded(case)
    declared: Any = getattr(coded.config, "rounding", None)
    case.require(isinstance(declared, Operand), "its config declares no error: `rounding`")
    flat = coded.value.double().view(-1, *coded.shape[-2:])
    bound = torch.stack([operand_error(each, declared) for each in flat]).view(coded.shape)
    near(case, coded.decoded, Bounded(exact=coded.value.double(), bound=bound), "the value")
    zeros = coded.value == 0
    case.equal(coded.decoded[zeros].abs(), coded.value[zeros].abs(), "zeros")


@law(
    "codec", "repeats", "what was decoded comes back as it is", kills="scale-of-the-next-binade", examples=20
)
def repeats(case: Case) -> None:
    coded = Coded(case)
    again = coded.codec.encode(coded.decoded)
    case.equal(coded.codec.decode(again), coded.decoded, "a second time")


@law(
    "codec",
    "repeats-codes",
    "what was decoded has the very codes and scales that it had",
    kills="scale-of-the-next-binade",
    claimed=True,
    examples=20,
)
def repeats_codes(case: Case) -> None:
    coded = Coded(case)
    for name, one, two in zip(coded.names, coded.parts, coded.codec.encode(coded.decoded), strict=True):
        case.equal(_bits(two), _bits(one), name)


@law(
    "codec",
    "powers-of-two",
    "a value times a power of two has the same codes",
    kills="smallest-magnitude-too-large",
    claimed=True,
)
def powers_of_two(case: Case) -> None:
    coded = Coded(case)
    if not 2.0**-60 < float(coded.value.abs().max()) < 2.0**60:
        case.draw.reject("it is near the ends of fp32")
    power = 2.0 ** case.integer("exponent", -30, 30)
    codes, *_ = coded.codec.encode(coded.value * power)
    case.equal(_bits(codes), _bits(coded.parts[0]), "codes")
    case.equal(
        coded.codec.decode(coded.codec.encode(coded.value * power)), coded.decoded * power, "the value"
    )


@law("codec", "stored", "the tensors are those that its config declares", kills="scales-of-whole-blocks")
def stored(case: Case) -> None:
    coded = Coded(case)
    declared = coded.config.stored(coded.weight)
    case.equal(
        [(each.shape, str(each.dtype)) for each in declared], [_kind(each) for each in coded.parts], "stored"
    )
    case.equal(declared[0].name, coded.weight.name, "the name of the codes")
    case.equal(len({each.name for each in declared}), len(declared), "different names")
    case.require(not any(each.trains for each in declared), "codes or scales train")
    # Other names follow the weight's, so that an alias has them too.
    case.require(all(each.name.startswith(coded.weight.name) for each in declared), f"names: {coded.names}")
    for index, part in enumerate(coded.parts):
        told = coded.codec.wrong(index, part)
        case.require(told is None, f"{coded.names[index]} that it wrote itself are wrong: {told}")


@law(
    "codec",
    "rows",
    "rows of a value are decoded as in the whole",
    kills="rows-from-a-blocks-edge",
    examples=20,
)
def rows(case: Case) -> None:
    coded = Coded(case, rows=SEVERAL, columns=(5, 129, WIDE))
    start = case.integer("start", 0, coded.shape[-2])
    stop = case.integer("stop", start, coded.shape[-2])
    dtype = DTYPES[case.choice("dtype", OUT)]
    whole = coded.codec.decode(coded.parts, dtype)
    for first, last in ((start, stop), *((at, coded.shape[-2]) for at in range(0, coded.shape[-2], 32))):
        found = coded.codec.decode(coded.parts, dtype, slice(first, last))
        case.equal(found, whole[..., first:last, :], f"rows {first} to {last}")
    case.equal(whole, coded.decoded.to(dtype) if dtype == torch.bfloat16 else whole, "in bfloat16")
    case.equal(
        whole.to(torch.float32) if dtype == torch.float64 else coded.decoded, coded.decoded, "in float64"
    )


@law("codec", "cuts", "what is cut off holds that part of the value", kills="cut-within-a-block", examples=20)
def cuts(case: Case) -> None:
    coded = Coded(case, rows=SEVERAL, columns=SEVERAL)
    dim = case.choice("dim", (-2, -1))
    length = coded.shape[dim]
    start = case.integer("start", 0, length - 1)
    stop = case.integer("stop", start + 1, length)
    edges = coded.config.cut(dim, start, stop)
    case.equal(len(edges), len(coded.parts), "ranges, one for each tensor")
    for name, part, (low, high) in zip(coded.names, coded.parts, edges, strict=True):
        told = f"{name} are cut at {low} and {high}, of {part.shape[dim]}"
        case.require(0 <= low < high <= part.shape[dim], told)
    pieces = tuple(part.narrow(dim, a, b - a) for part, (a, b) in zip(coded.parts, edges, strict=True))
    case.require(edges[0][0] <= start and edges[0][1] >= stop, f"codes of {edges[0]} for [{start}, {stop})")
    found = coded.codec.decode(pieces).narrow(dim, start - edges[0][0], stop - start)
    case.equal(found, coded.decoded.narrow(dim, start, stop - start), "the part")


@law("codec", "stacks", "each matrix of a stack is coded alone", kills="stack-is-one-matrix", examples=20)
def stacks(case: Case) -> None:
    coded = Coded(case, stacked=True)
    for group, value in enumerate(coded.value):
        alone = coded.codec.encode(value)
        for name, one, part in zip(coded.names, alone, coded.parts, strict=True):
            case.equal(_bits(part[group]), _bits(one), f"{name} of matrix {group}")
        case.equal(coded.decoded[group], coded.codec.decode(alone), f"matrix {group}")


@law(
    "codec",
    "not-finite",
    "what is not finite stays so and leaves all else within the declared error, or is refused",
    kills="infinity-is-a-scale",
)
def not_finite(case: Case) -> None:
    coded = Coded(case)
    index = tuple(case.integer(f"index {n}", 0, length - 1) for n, length in enumerate(coded.shape))
    odd, plain = coded.value.clone(), coded.value.clone()
    odd[index], plain[index] = case.choice("odd", (torch.nan, torch.inf, -torch.inf)), 0
    try:
        parts = coded.codec.encode(odd)
    except ComposeError:
        return
    found = coded.codec.decode(parts)
    case.require(not found[index].isfinite(), f"{float(odd[index])} has become {float(found[index])}")
    found[index] = 0
    flat = plain.double().view(-1, *coded.shape[-2:])
    bound = torch.stack([operand_error(each, coded.config.rounding) for each in flat]).view(coded.shape)
    near(case, found, Bounded(exact=plain.double(), bound=bound), "the rest")
    for place, part in enumerate(parts):
        told = coded.codec.wrong(place, part)
        case.require(told is None, f"{coded.names[place]} that it wrote itself are wrong: {told}")


@law("codec", "faults", "scales that are no numbers are told", kills="scales-are-not-looked-at", examples=8)
def faults(case: Case) -> None:
    coded = Coded(case)
    odd = case.choice("odd", (torch.nan, torch.inf, -torch.inf))
    for place, part in enumerate(coded.parts):
        if place == 0 or not part.is_floating_point() or part.itemsize == 1 or not part.numel():
            continue
        spoilt = part.clone()
        spoilt.view(-1)[case.integer(f"place in {coded.names[place]}", 0, 10**6) % part.numel()] = odd
        told = coded.codec.wrong(place, spoilt)
        case.require(isinstance(told, str) and told, f"{coded.names[place]} with {odd} are accepted")
        case.require("\n" not in str(told), "what is wrong is told in several lines")


@law(
    "codec",
    "dtypes",
    "a value is coded as it is, in whatever dtype it comes",
    kills="coded-in-half",
    examples=10,
)
def dtypes(case: Case) -> None:
    coded = Coded(case)
    narrow = coded.value.bfloat16()
    wide = coded.codec.encode(narrow.to(DTYPES[case.choice("in", ("float32", "float64"))]))
    for name, one, two in zip(coded.names, coded.codec.encode(narrow), wide, strict=True):
        case.equal(_bits(one), _bits(two), name)
    before = coded.value.clone()
    with torch.no_grad():
        first = coded.codec.encode(coded.value)
    case.equal(coded.value, before, "the value after it was encoded")
    for name, one, two in zip(
        coded.names, first, coded.codec.encode(coded.value.mT.contiguous().mT), strict=True
    ):
        case.equal(_bits(two), _bits(one), f"{name} of a value in another order in memory")


def _bits(tensor: Tensor) -> Tensor:
    """Narrow floats by their bits, which compare exactly."""
    return tensor.contiguous().view(torch.uint8) if tensor.itemsize == 1 else tensor


def _kind(tensor: Tensor) -> tuple[Any, str]:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
