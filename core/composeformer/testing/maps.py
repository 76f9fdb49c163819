"""A linear map of a precision policy under test, alone: drawn, made, run, and bounded by what the policy declares.

The bound is an inequality for each element, not an estimate. With |a~ - a| <= e_a and |b~ - b| <= e_b,

    |a~ b~ - a b| <= (|a| + e_a)(|b| + e_b) - |a| |b|

and a sum adds `Rounding.sums` of the larger product, a result its own rounding.

Shapes: N rows, I inputs, O outputs, E groups.
"""

from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from math import prod
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from composeformer import lazy
from composeformer.contracts import Facts, Linear, Part
from composeformer.errors import ComposeError
from composeformer.rounding import FLOATS, Operand, Rounding
from composeformer.site import Site
from composeformer.spec import Spec
from composeformer.spec.document import from_data
from composeformer.spec.resolve import Resolver
from composeformer.tensors import DTYPES
from composeformer.testing.case import Case
from composeformer.testing.law import LawBroken
from composeformer.testing.subject import Subject
from composeformer.testing.tables import tables

ROLE = "layers.0.mixer.map"
ROWS = (1, 2, 5, 33, 130)
OUTPUTS = (1, 2, 7, 33, 129, 140)
INPUTS = (1, 2, 31, 33, 127, 129, 260)
# Of whole vectors, as products of several rows at once ask for.
WHOLE = (16, 64, 136)
CONTENTS = ("even", "wide", "blocks", "huge", "zeros", "integers", "tiny", "units", "units")
# Numbers this far below the normal ones may be flushed to zero by units that know no others.
FLUSHED = 2.0**-126

Ends = list[int] | None


def configured(case: Case, label: str = "config") -> Part:
    """The component with a drawn config, as a spec would hold it; what no spec could say is rejected."""
    component, registry = case.subject.component, case.subject.registry
    table = case.draw(label, tables(component))
    resolver = Resolver(from_data({}, "case"), registry)
    part = resolver.reference(component.slot, table, ((component.slot,),))
    if part is None:
        case.draw.reject(str(resolver.error().problems[0]))
    told = unserved(case.subject, part.config)
    if told is not None:
        case.draw.reject(told)
    return part


def unserved(subject: Subject, config: Any) -> str | None:
    """Why the implementation does not serve a config on this machine."""
    needs = subject.implementation.needs
    if needs is None:
        return None
    spec = around()
    slot, width = subject.slot, spec.model.hidden_size
    return needs(
        Facts(
            config=config,
            site=Site(path=slot, slot=slot, layer=None, width=width, spec=spec),
            phase="train",
            device="cpu",
            dtype=str(getattr(config, "activations", "float32")),
        )
    )


@cache
def around() -> Spec:
    """The spec around a part that is tried alone."""
    return Spec.load("tiny-llama")


def serves_cpus(subject: Subject) -> str | None:
    """Why no case can be made of an implementation here: it refuses the config of defaults, where there is one."""
    try:
        config = subject.component.config()
    except TypeError:
        return None
    return unserved(subject, config)


@attrs.frozen(kw_only=True, eq=False)
class Bounded:
    """An exact result in float64, and how far another may be from each of its elements."""

    exact: Tensor
    bound: Tensor


def operand_error(value: Tensor, declared: Operand) -> Tensor:
    """How far each element of a matrix (R, C) in float64 may be moved; NaN and infinities count for nothing."""
    size = value.abs().nan_to_num(nan=0.0, posinf=0.0)
    found = declared.relative * size
    if not value.numel() or not (declared.shared or declared.least):
        return found
    rows, columns = value.shape
    r, c = declared.block[0] or rows, declared.block[1] or columns
    padded = nn.functional.pad(size, (0, -columns % c, 0, -rows % r))
    largest = padded.view(-(-rows // r), r, -(-columns // c), c).amax((1, 3))
    floor = (declared.shared * largest).clamp(min=declared.least)
    # Zero has a code in every format.
    return found + floor.repeat_interleave(r, 0)[:rows].repeat_interleave(c, 1)[:, :columns] * (size != 0)


class Maps:
    """One linear map in a case: `declared`, its values, and what it is given.

    `groups` is None or a number; `ends` are those of the groups' rows, and rows from the last of them on are nobody's.
    """

    def __init__(
        self,
        case: Case,
        *,
        groups: bool | None = None,
        bias: bool | None = None,
        sensitive: bool | None = None,
        dtype: str | None = None,
        content: str | None = None,
        rows: Sequence[int] = ROWS,
        inputs: Sequence[int] = INPUTS,
        outputs: Sequence[int] = OUTPUTS,
    ) -> None:
        self.case = case
        self.part = configured(case)
        self.config = self.part.config
        self.policy = lazy.load(case.subject.implementation.module)(self.config)
        stacked = case.boolean("stacked") if groups is None else groups
        self.groups = case.integer("groups", 1, 4) if stacked else None
        whole = case.boolean("whole vectors")
        self.declared = Linear(
            name="map",
            inputs=case.choice("inputs", WHOLE if whole and inputs is INPUTS else inputs),
            outputs=case.choice("outputs", WHOLE if whole and outputs is OUTPUTS else outputs),
            bias=case.boolean("bias") if bias is None else bias,
            groups=self.groups,
            sensitive=case.boolean("sensitive") if sensitive is None else sensitive,
        )
        self.given = dtype or case.choice("gives", (None, "float32", "bfloat16"))
        number = case.choice("rows", rows)
        self.ends: Ends = None
        if self.groups is not None:
            cuts = [case.integer(f"end {i}", 0, number) for i in range(self.groups)]
            self.ends = sorted(cuts)
        self.number = number
        sort = content or case.choice("content", CONTENTS)
        self.unit = case.choice("unit", ("weight", "x", "gradient")) if sort == "units" else None
        self.weight_values = self._content("weight", sort, self.declared.weight.shape)
        self.bias_values = (
            case.normal("shift", *self.declared.weights[1].shape, dtype=torch.float32)
            if self.declared.bias
            else None
        )
        comes = DTYPES[case.choice("comes in", (self.config.activations, "float32"))]
        self.x = self._content("x", sort, (number, self.declared.inputs)).to(comes)
        self.cotangent = self._content("gradient", sort, (number, self.declared.outputs))
        if self.ends is not None:
            # What nobody computes nobody may read.
            self.x[self.ends[-1] :], self.cotangent[self.ends[-1] :] = torch.nan, torch.nan

    def _content(self, label: str, sort: str, shape: tuple[int, ...]) -> Tensor:
        """fp32 numbers that neither overflow nor vanish in what they are computed in."""
        case, whole = self.case, (prod(shape[:-1]), shape[-1])
        x = case.normal(label, *whole, dtype=torch.float32)
        generator = torch.Generator().manual_seed(case.draw.values[label] + 1)
        reach = 1 if self.half else 8
        if sort == "wide":
            x = x * torch.exp2(torch.randint(-reach, reach + 1, whole, generator=generator).float())
        elif sort == "blocks":
            # Neighbouring blocks of any size of their own scale: what takes another's is far off.
            number = whole[0] // 32 + 1, whole[1] // 32 + 1
            powers = torch.randint(-reach, reach + 1, number, generator=generator).float().exp2()
            x = x * powers.repeat_interleave(32, 0)[: whole[0]].repeat_interleave(32, 1)[:, : whole[1]]
        elif sort == "integers":
            x = torch.randint(-8, 9, whole, generator=generator).float()
        elif sort == "huge" and x.numel():
            x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = 4.0**reach
        elif sort == "tiny" and label != "weight":
            x = x * 2.0 ** (-20 if self.half else -110)
        elif sort == "units" and label == self.unit:
            # One in each row: a product is then one element of the other operand.
            x = torch.eye(whole[1]).repeat(-(-whole[0] // whole[1]), 1)[: whole[0]]
        elif sort == "zeros" and x.numel():
            x[:, torch.rand(whole[1], generator=generator) < 0.5] = 0
            x[: whole[0] // 2] = 0
        return x.view(shape)

    @property
    def half(self) -> bool:
        """Whether it is computed in a dtype of few exponents."""
        return str(self.form.compute) == "float16"

    # What is declared of it

    @property
    def sensitive(self) -> bool:
        return self.declared.sensitive

    @cached_property
    def form(self) -> Any:
        """The format of its weight."""
        return self.config.format(ROLE, self.declared.weight, self.sensitive)

    @cached_property
    def rounding(self) -> Rounding:
        found: Rounding = self.config.rounding(ROLE, self.declared.weight, self.sensitive)
        return found

    @cached_property
    def codec(self) -> Any:
        """The codec of its weight, None where it is stored plainly."""
        if self.form.codec is None:
            return None
        component = self.case.subject.registry.get("codec", self.form.codec)
        return lazy.load(component.implementations[0].module)(component.config())

    # What it is made of

    def stored(self, value: Tensor) -> Tensor:
        """Weights as masters hold them, in fp32 or wider; those that are stored as codes as they were."""
        return value if self.codec is not None else value.to(DTYPES[self.form.storage])

    def shifted(self, value: Tensor) -> Tensor:
        """A bias as it is stored."""
        form = self.config.format(ROLE, self.declared.weights[1], self.sensitive)
        return value.to(DTYPES[form.storage])

    def linear(self, weight: Tensor | None = None, shift: Tensor | None = None, policy: Any = None) -> Any:
        """A map of these values, by default the case's own."""
        value = self.weight_values if weight is None else weight
        shift = self.bias_values if shift is None else shift
        declared = attrs.evolve(self.declared, groups=None if value.ndim == 2 else len(value))
        held: list[Tensor]
        if self.codec is not None:
            held = [nn.Buffer(part) for part in self.codec.encode(value)]
        else:
            held = [nn.Parameter(self.stored(value).clone())]
        bias = None if shift is None else nn.Parameter(self.shifted(shift).clone())
        dtype = None if self.given is None else DTYPES[self.given]
        return (policy or self.policy).linear(ROLE, declared, held[0], bias, scales=held[1:], dtype=dtype)

    def offsets(self, ends: Ends) -> tuple[Tensor, ...]:
        return () if ends is None else (torch.tensor(ends, dtype=torch.int32),)

    def run(
        self, linear: Any, x: Tensor | None = None, cotangent: Tensor | None = None, ends: Ends = None
    ) -> dict[str, Tensor]:
        """`output`, and the gradients of `input`, `weight` and `bias` where they have one.

        A policy whose weights do not train may refuse gradients by a ComposeError.
        """
        ends = self.ends if ends is None else ends or None
        x = (self.x if x is None else x).detach().clone().requires_grad_()
        linear.zero_grad(set_to_none=True)
        y = linear(x, *self.offsets(ends))
        found = {"output": y.detach()}
        try:
            y.backward((self.cotangent if cotangent is None else cotangent).to(y.dtype))
        except ComposeError:
            if self.codec is None:
                raise
            return found
        named = {"input": x, **{name: p for name, p in linear.named_parameters() if p.requires_grad}}
        for name, each in named.items():
            if each.grad is None:
                raise LawBroken(f"{name} has no gradient")
            found[name] = each.grad.detach()
        return found

    # How right it is

    def parts(self, ends: Ends) -> Iterator[tuple[slice, Any]]:
        """The rows of each group, and what picks its weight."""
        if ends is None:
            yield slice(0, self.number), ...
            return
        for group, (start, stop) in enumerate(zip([0, *ends], ends)):
            yield slice(start, stop), group

    def bounded(self, out: torch.dtype, x: Tensor | None = None, same: bool = False) -> dict[str, Bounded]:
        """All that `run` gives, in float64 by the definition, with bounds. `same` is for how far two computations may
        be apart that multiply the same rounded operands.
        """
        x, g = (self.x if x is None else x).double(), self.cotangent.to(out).double()
        w = self.stored(self.weight_values).double()
        b = None if self.bias_values is None else self.shifted(self.bias_values).double()
        sizes = {"output": (len(x), w.shape[-2]), "input": tuple(x.shape), "weight": tuple(w.shape)}
        if b is not None:
            sizes["bias"] = tuple(b.shape)
        found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in sizes.items()}
        bounds = {name: torch.zeros_like(each) for name, each in found.items()}
        r = self.rounding
        weighs = torch.float32 if self.codec is not None else DTYPES[self.form.storage]
        for rows, own in self.parts(self.ends):
            xs, gs, ws = x[rows], g[rows], w[own]
            products = {
                "output": (rows, xs, r.activation, ws, r.weight, out),
                "input": (rows, gs, r.gradient, ws.mT, r.turned, self.x.dtype),
                "weight": (own, gs.mT, r.gradient, xs.mT, r.activation, weighs),
            }
            for name, (place, left, l_error, right, r_error, dtype) in products.items():
                value, most, least = _product(left, l_error, right, r_error)
                if name == "output" and b is not None:
                    value, least = value + b[own], least + b[own].abs()
                    most = most + b[own].abs() * (1 + r.result)
                found[name][place] = value
                bounds[name][place] = self._bound(value, most, least, left, right, dtype, same)
            if b is not None:
                one = torch.ones(1, len(gs), dtype=torch.float64)
                value, most, least = _product(one, Operand(), gs.mT, r.gradient)
                kind = self.shifted(b).dtype
                found["bias"][own] = value[0]
                bounds["bias"][own] = self._bound(value, most, least, one, gs.mT, kind, same)[0]
        return {name: Bounded(exact=each, bound=bounds[name]) for name, each in found.items()}

    def summed(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Bounded:
        """a b^T of operands that are rounded already, or need no rounding."""
        value, most, least = _product(a, Operand(), b, Operand())
        return Bounded(exact=value, bound=self._bound(value, most, least, a, b, dtype, False))

    def bounded_matrix(self) -> Bounded:
        """The weight that is multiplied by."""
        value = self.stored(self.weight_values).double()
        stack = value.view(-1, *value.shape[-2:])
        bound = torch.stack([operand_error(each, self.rounding.weight) for each in stack])
        return Bounded(exact=value, bound=bound.view(value.shape))

    def _bound(
        self, value: Tensor, most: Tensor, least: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, same: bool
    ) -> Tensor:
        """Of a product of a and b: of its operands, its sum, and its result; what is flushed to zero too."""
        length = a.shape[1]
        sums = most * (self.rounding.sums(length) + length * 2.0**-52)
        largest = 1 + sum(float(each.abs().max()) for each in (a, b) if each.numel())
        apart = sums + length * FLUSHED * largest + (0 if same else most - least)
        # In what products are in, once more where a bias was added, and in the dtype given.
        unit = 2 * self.rounding.result + FLOATS[str(dtype).removeprefix("torch.")][0]
        normal = max(torch.finfo(dtype).tiny, FLOATS[self.form.compute][1] if self.half else 0.0)
        reached = most + sums if same else value.abs() + apart
        return (apart + unit * (1 + unit) * reached + normal) * (2 if same else 1)


def _product(a: Tensor, a_error: Operand, b: Tensor, b_error: Operand) -> tuple[Tensor, Tensor, Tensor]:
    """a b^T, the most that its rounded operands' magnitudes sum up to, and what they do as they are."""
    most = (a.abs() + operand_error(a, a_error)) @ (b.abs() + operand_error(b, b_error)).mT
    return a @ b.mT, most, a.abs() @ b.abs().mT


def near(case: Case, found: Tensor, wanted: Bounded, told: str, times: float = 1.0) -> None:
    """Each element within its bound; the worst of them is what is told."""
    if found.shape != wanted.exact.shape:
        raise LawBroken(f"{told}: has shape {tuple(found.shape)}, must have {tuple(wanted.exact.shape)}")
    if not found.numel():
        return
    error = (found.double() - wanted.exact).detach().abs().nan_to_num(nan=torch.inf)
    bound = times * wanted.bound.detach()
    worst = int((error / bound.clamp(min=2.0**-1000)).argmax())
    place = tuple(int(each) for each in torch.unravel_index(torch.tensor(worst), found.shape))
    case.within(float(error.flatten()[worst]), float(bound.flatten()[worst]), f"{told} at {place}")
