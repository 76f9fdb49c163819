"""One case of a law: a part in a tiny model, drawn, and the means to compute and compare.

Shapes: B rows, T tokens, D hidden size.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from composeformer.assemble import build, in_dtype
from composeformer.config import facts_of
from composeformer.contracts import Constant, Facts, Part
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.plan import Node
from composeformer.spec import Spec, inherit
from composeformer.spec.document import from_data
from composeformer.tensors import DTYPES
from composeformer.testing.bounds import FLOOR, Terms, coarser, gap, roundoff, size, terms_of
from composeformer.testing.drawing import Draw
from composeformer.testing.frame import frames
from composeformer.testing.law import LawBroken
from composeformer.testing.subject import Subject

SEEDS = st.integers(0, 2**16)
# Those that laws compute in, the strictest first.
PRECISIONS = ("float64", "float32", "bfloat16")
# Cases that magnify a relative change this much say nothing: a tie between experts is about to turn.
WORST_CONDITION = 1e4
STEP = 2.0**-24
# How much larger than a rounding the changes are that must turn no choice, and in how many ways they are tried.
WIDER, WAYS = 8, 6

Run = Callable[[Model, Tensor], Tensor]


@attrs.frozen(kw_only=True)
class Condition:
    """How much a relative change of all that enters is magnified: in the output, and in gradients."""

    output: float = 1.0
    gradients: float = 1.0


class Case:
    """A law's arguments. Everything random is drawn under a label; `spec`, `model` and `judge` are made when they are
    first asked for. `error` and `bound` are those of the comparison that came nearest to failing.
    """

    def __init__(self, subject: Subject, draw: Draw) -> None:
        self.subject = subject
        self.draw = draw
        self.condition = Condition()
        self.error, self.bound = 0.0, 0.0

    # What is tried

    @cached_property
    def data(self) -> dict[str, Any]:
        """The spec around the part, without its precision, as plain data."""
        found: dict[str, Any] = self.draw("spec", frames(self.subject))
        return found

    @cached_property
    def spec(self) -> Spec:
        """The whole spec, in a dtype that the implementation serves."""
        try:
            spec = self.spec_of(self.data)
        except SpecError as error:
            self.draw.reject(str(error.problems[0]))
        if self.subject.slot == "precision":
            return spec
        able = [dtype for dtype in self.dtypes(spec) if self._refusal(spec, dtype) is None]
        if not able:
            self.draw.reject(str(self._refusal(spec, spec.formats.activations)))
        return in_dtype(spec, self.draw("dtype", st.sampled_from(able)))

    def spec_of(self, data: Mapping[str, Any]) -> Spec:
        """A spec of the subject's registry. Raises SpecError."""
        return Spec(inherit.resolve(from_data(data, "case"), None), self.subject.registry)

    def dtypes(self, spec: Spec) -> list[str]:
        """The dtypes that the default precision policy offers, of those that laws compute in."""
        default = spec.registry.default("precision")
        choices = facts_of(default.config)["dtype"].choices if default is not None else ()
        return [dtype for dtype in PRECISIONS if dtype in (choices or ())]

    def _refusal(self, spec: Spec, dtype: str) -> str | None:
        """Why the implementation does not serve here."""
        node = self.find(spec)
        needs = self.subject.implementation.needs
        if node is None or needs is None:
            return None
        for phase in self.subject.implementation.phases:
            told = needs(
                Facts(config=node.part.config, site=node.site, phase=phase, device="cpu", dtype=dtype)
            )
            if told is not None:
                return told
        return None

    def find(self, spec: Spec) -> Node | None:
        """The first place of the component in a spec."""
        return next((n for n in spec.plan.nodes() if n.part.component is self.subject.component), None)

    @cached_property
    def node(self) -> Node:
        """The part on paper."""
        found = self.find(self.spec)
        assert found is not None, f"{self.subject} is not in the spec drawn for it"
        return found

    @property
    def config(self) -> Any:
        """The part's config; that of a part which a model has one of, too."""
        slot = self.subject.slot
        part: Part | None = self.spec.singles.get(slot)
        return (
            part.config
            if part is not None and part.component is self.subject.component
            else self.node.part.config
        )

    @cached_property
    def model(self) -> Model:
        """The part in its model: values drawn, none of them all ones or zeros."""
        return self.built(self.spec)

    def built(self, spec: Spec) -> Model:
        """A model of a spec with the case's values."""
        if "seed" not in self.draw.values:
            self._seed: int = self.draw("seed", SEEDS)
        model = build(spec, seed=self._seed)
        enliven(model, self._seed)
        return model

    @cached_property
    def judge(self) -> Model:
        """The same model with the same values, in float64 and by reference implementations alone."""
        plain = in_dtype(self.spec_of(without_choices(self.data)), "float64")
        judge = build(plain, seed=0)
        values = self.model.state_dict()
        judge.load_state_dict({name: value.to(values[name].dtype) for name, value in values.items()})
        return judge

    def part_of(self, model: Model) -> Any:
        """The part in a model of this spec."""
        return model.get_submodule(self.node.path)

    @property
    def part(self) -> Any:
        return self.part_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """What activations are in."""
        return DTYPES[self.spec.formats.activations]

    # What it is given

    def integer(self, label: str, low: int, high: int) -> int:
        found: int = self.draw(label, st.integers(low, high))
        return found

    def boolean(self, label: str) -> bool:
        found: bool = self.draw(label, st.booleans())
        return found

    def choice(self, label: str, choices: Any) -> Any:
        return self.draw(label, st.sampled_from(list(choices)))

    def integers(self, label: str, low: int, high: int, shortest: int = 1, longest: int = 5) -> list[int]:
        found: list[int] = self.draw(
            label, st.lists(st.integers(low, high), min_size=shortest, max_size=longest)
        )
        return found

    def normal(self, label: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers from a standard normal distribution, in the dtype of activations unless another is given."""
        generator = torch.Generator().manual_seed(self.draw(label, SEEDS))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype or self.dtype)

    def stream(self, label: str, rows: int, tokens: int) -> Tensor:
        """Hidden states (B, T, D) as they enter the part."""
        return self.normal(label, rows, tokens, self.node.site.width)

    def ids(self, label: str, rows: int, tokens: int) -> Tensor:
        """Token ids (B, T)."""
        generator = torch.Generator().manual_seed(self.draw(label, SEEDS))
        return torch.randint(self.spec.model.vocab_size, (rows, tokens), generator=generator)

    # What is computed

    def gradients(
        self, model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The output, and the gradients of x (`input`, where it is floating) and of every parameter that has one, for a
        cotangent, by default a ramp from -1 to 1.
        """
        x = x.detach().clone().requires_grad_(x.is_floating_point())
        model.zero_grad(set_to_none=True)
        y = run(x)
        if cotangent is None:
            cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        torch.autograd.backward(y, cotangent.to(y.dtype))
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        entered = {} if x.grad is None else {"input": x.grad}
        return {"output": y.detach(), **entered, **found}

    def settle(self, run: Run, x: Tensor) -> None:
        """Measures the case's condition at x, in float64; an ill-conditioned case is rejected.

        `run(model, x)` computes the part in any model of the spec.
        """
        self.condition = self.conditioned(run, x)

    def conditioned(self, run: Run, x: Tensor, step: float = STEP, ways: int = 2) -> Condition:
        """The condition at x, for a comparison there: by relative changes of about `step`, in so many random ways."""
        judge = self.judge
        exact = x.detach().to(torch.float64) if x.is_floating_point() else x
        plain = self.gradients(judge, lambda y: run(judge, y), exact)
        for name, each in plain.items():
            self.finite(each, f"the reference in float64: {name}")
        generator = torch.Generator().manual_seed(0)

        def moved(tensor: Tensor) -> Tensor:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return (tensor.detach().to(torch.float64) * (1 + step * noise)).to(tensor.dtype)

        kept = {name: p.detach().clone() for name, p in judge.named_parameters()}
        output = gradients = 0.0
        for _ in range(ways):
            with torch.no_grad():
                for name, p in judge.named_parameters():
                    if p.dtype == torch.float64:
                        p.copy_(moved(kept[name]))
            there = moved(exact) if exact.is_floating_point() else exact
            found = self.gradients(judge, lambda y: run(judge, y), there)
            output = max(output, self._magnified({"output": found["output"]}, plain) / step)
            gradients = max(gradients, self._magnified(found, plain) / step)
            with torch.no_grad():
                for name, p in judge.named_parameters():
                    p.copy_(kept[name])
        if not max(output, gradients) <= WORST_CONDITION:
            self.draw.reject(f"it magnifies a relative change {max(output, gradients):.3g} times")
        return Condition(output=max(1.0, output), gradients=max(1.0, gradients))

    def unturned(self, run: Run, x: Tensor, terms: Terms) -> None:
        """Rejects a settled case in which several roundings of a narrow dtype change more than their bound: a choice
        turns, be it of the largest of some numbers, or of which of two is the larger.
        """
        unit = roundoff(self.dtype)
        if unit <= roundoff(torch.float32):
            return
        found, bound = self.conditioned(run, x, WIDER * unit, WAYS), terms.error(self.dtype) / (WIDER * unit)
        settled = self.condition
        if found.output > bound * settled.output or found.gradients > bound * settled.gradients:
            self.draw.reject("a rounding turns a choice")

    @staticmethod
    def _magnified(found: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> float:
        floor = FLOOR * size({n: t for n, t in plain.items() if n != "output"})
        scales = {n: max(size(plain[n]), floor if n != "output" else 0.0) for n in found if n in plain}
        return max((gap(found[n], plain[n]) / s for n, s in scales.items() if s), default=0.0)

    # What must hold

    @cached_property
    def terms(self) -> Terms:
        """What a pass through the part sums up and rounds."""
        return terms_of(self.node)

    def close(
        self,
        found: Any,
        wanted: Any,
        told: str,
        *,
        terms: int = 0,
        scale: float | None = None,
        stages: int = 0,
        where: Callable[[], Condition] | None = None,
    ) -> None:
        """A tensor, or each of a mapping (gradients, by name), within the bound of two right computations.

        `terms` are those that sums have beyond the part's own linear maps: keys, tokens. Errors are relative to the
        largest magnitude of the tensor, or to `scale`. `where` measures the condition at what is compared, where that
        is another place than the case's: it is asked if the case's is not enough.
        """
        kept = self.condition, self.error, self.bound
        try:
            self._close(found, wanted, told, terms, scale, stages)
        except LawBroken:
            if where is None:
                raise
            self.error, self.bound = kept[1:]
            self.condition = where()
            self._close(found, wanted, told, terms, scale, stages)
        finally:
            self.condition = kept[0]

    def _close(
        self, found: Any, wanted: Any, told: str, terms: int, scale: float | None, stages: int
    ) -> None:
        if isinstance(wanted, Mapping):
            if found.keys() != wanted.keys():
                odd = sorted({*found} ^ {*wanted})
                raise LawBroken(f"{told}: only one of the two has {odd[0]}")
            entered = {name: each for name, each in wanted.items() if name != "output"}
            floor = FLOOR * size(entered) if scale is None else scale
            for name, each in wanted.items():
                of_output = name == "output"
                at_least = 0.0 if of_output else floor
                magnified = self.condition.output if of_output else self.condition.gradients
                # A parameter of a dtype that its part fixes has a gradient in it: fp32 in a model of float64.
                dtype = self.dtype if name in ("output", "input") else coarser(found[name].dtype, self.dtype)
                whole = max(size(each), at_least)
                self._near(found[name], each, f"{told}: {name}", whole, magnified, terms, stages, dtype)
            return
        at = size(wanted) if scale is None else scale
        self._near(found, wanted, told, at, self.condition.output, terms, stages, self.dtype)

    def _near(
        self,
        found: Tensor,
        wanted: Tensor,
        told: str,
        scale: float,
        magnified: float,
        terms: int,
        stages: int,
        dtype: torch.dtype,
    ) -> None:
        if found.shape != wanted.shape:
            raise LawBroken(f"{told}: has shape {tuple(found.shape)}, must have {tuple(wanted.shape)}")
        whole = attrs.evolve(self.terms.plus(terms), stages=self.terms.stages + stages)
        self.within(gap(found, wanted), whole.error(dtype) * magnified * scale, told)

    def within(self, error: float, bound: float, told: str) -> None:
        """An error no larger than its bound; both are kept where they are the worst so far."""
        if (error or bound) and error * self.bound >= self.error * bound:
            self.error, self.bound = error, bound
        if not error <= bound:
            raise LawBroken(f"{told}: differs by {error:.3g}, and at most {bound:.3g} is rounding")

    def equal(self, found: Any, wanted: Any, told: str) -> None:
        """The same bits, for tensors; NaN equals NaN. Anything else by `==`."""
        if isinstance(wanted, Tensor):
            if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
                raise LawBroken(f"{told}: {_told(found)}, must be {_told(wanted)}")
            if (error := gap(found, wanted)) > 0:
                raise LawBroken(f"{told}: must be equal, differs by {error:.3g}")
        elif found != wanted:
            raise LawBroken(f"{told}: {found}, must be {wanted}")

    def require(self, holds: object, told: str) -> None:
        if not holds:
            raise LawBroken(told)

    def finite(self, tensor: Tensor, told: str) -> None:
        if not bool(tensor.detach().isfinite().all()):
            raise LawBroken(f"{told}: is not finite")


def _told(found: object) -> str:
    if isinstance(found, Tensor):
        return f"a {str(found.dtype).removeprefix('torch.')} tensor of shape {tuple(found.shape)}"
    return f"a {type(found).__name__}"


def enliven(model: Model, seed: int) -> None:
    """Moves every value that starts as a constant, as training would: scales off one, biases off zero, and the buffers
    that a part updates after steps.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for node in model.spec.plan.nodes():
            updated = hasattr(model.get_submodule(node.path), "after_step")
            for name, weight in node.tensors():
                one = tensors.get(name)
                if one is None or not one.is_floating_point() or not (weight.trains or updated):
                    continue
                if isinstance(weight.init, Constant):
                    one += (0.3 * torch.randn(one.shape, generator=generator)).to(one.dtype)


def without_choices(data: Any) -> Any:
    """The same data with `reference` wherever an implementation is chosen, and where none is."""
    if isinstance(data, Mapping):
        found = {key: without_choices(value) for key, value in data.items() if key != "implementation"}
        return {**found, "implementation": "reference"} if "kind" in found else found
    return [without_choices(each) for each in data] if isinstance(data, list) else data
