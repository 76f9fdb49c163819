"""Whole models as what laws are tried on: a spec drawn over every slot, its model in float64, a batch of rows.

Two right computations of a model differ by rounding. How much that makes of a result is measured: every parameter is
moved by as much as the bound allows for, and what changes by more than it moved is magnified by its condition. Cases in
which a choice turns (a tie between experts) magnify without measure, and are rejected.

Shapes: B rows, T tokens, V vocabulary.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, cast

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from composeformer.assemble import in_dtype
from composeformer.contracts import Component, Implementation
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.plugins import current
from composeformer.registry import Registry
from composeformer.spec import Spec
from composeformer.tensors import ModelOutput
from composeformer.testing.bounds import FLOOR, Terms, gap, roundoff, size, terms_of
from composeformer.testing.case import SEEDS, Case
from composeformer.testing.drawing import Draw
from composeformer.testing.frame import STDS
from composeformer.testing.law import MODEL, Law, LawBroken, law
from composeformer.testing.specs import specs
from composeformer.testing.subject import plugins_named
from composeformer.train import Objective, TokenBatch, trainer

ANY = "any"
# What laws of whole models choose themselves, or a model has no part of.
APART = ("precision", "codec", "schedule", "data")
ROWS, TOKENS = 3, 8
# Beyond the parts' own sums: the tokens that a loss and gradients sum over, the keys that a query sees.
SUMMED = 4 * ROWS * TOKENS
# Of a condition and of a bound: more of either says nothing.
WORST_CONDITION, WORST_BOUND = 1e6, 1 / 32
GRADIENT = "gradient of "

Results = Mapping[str, Tensor]


@attrs.frozen(eq=False, kw_only=True)
class Models:
    """All models that a registry's components make; those that go by a plugin's name have a part of its own."""

    registry: Registry
    kind: str = ANY
    preferred: tuple[Component, ...] = ()
    slot: str = MODEL
    implementation: Implementation = attrs.field(factory=lambda: Implementation(ANY, ""))

    def __str__(self) -> str:
        return "whole models" if self.kind == ANY else f"whole models with parts of {self.kind}"


def models(plugin: str | None = None, registry: Registry | None = None) -> list[Models]:
    """All models, or those with a part of a plugin; none where it brings no part of a model.

    Raises InputError for a plugin that is not loaded.
    """
    registry = current().registry if registry is None else registry
    if plugin in (None, ANY):
        return [Models(registry=registry)]
    have = set(map(id, registry))
    brought = [each for info in plugins_named(plugin, registry) for each in info.components]
    own = tuple(each for each in brought if id(each) in have and each.slot not in APART)
    return [Models(registry=registry, kind=str(plugin), preferred=own)] if own else []


@attrs.frozen(kw_only=True)
class Measured:
    """Results by name, and by how much each magnifies what its model is moved by."""

    values: Results
    conditions: Mapping[str, float]

    def only(self, *names: str) -> "Measured":
        """Some of the results."""
        return attrs.evolve(self, values={name: self.values[name] for name in names})


class ModelCase(Case):
    """A law's arguments for whole models. `model` is shared by laws: what trains it takes a `fresh` one."""

    subject: Any

    def __init__(self, tried: Models, draw: Draw) -> None:
        super().__init__(tried, draw)  # type: ignore[arg-type]
        self.tried = tried
        self._measured: dict[str, Measured] = {}
        self._spares: list[Model] = []

    def again(self, draw: Draw) -> "ModelCase":
        """The same model and batch, for another law."""
        other = ModelCase(self.tried, draw)
        kept = ("data", "spec", "model", "batch", "objective", "_measured", "_seed", "_spares")
        other.__dict__ |= {name: self.__dict__[name] for name in kept if name in self.__dict__}
        return other

    # What is tried

    @cached_property
    def data(self) -> dict[str, Any]:
        """The spec as plain data, without what says how it is computed."""
        registry, own = self.tried.registry, self.tried.preferred
        drawn = specs(registry=registry, preferred=own, stds=st.sampled_from(STDS))
        found: dict[str, Any] = self.draw("spec", drawn)
        return {key: value for key, value in found.items() if key not in ("precision", "parallel")}

    @cached_property
    def spec(self) -> Spec:
        """The spec, in float64."""
        try:
            spec = in_dtype(self.spec_of(self.data), "float64")
        except SpecError as error:
            self.draw.reject(str(error.problems[0]))
        if self.tried.preferred:
            singles = [part.component for part in spec.singles.values() if part is not None]
            used = {*map(id, singles), *(id(node.part.component) for node in spec.plan.nodes())}
            if not any(id(each) in used for each in self.tried.preferred):
                self.draw.reject(f"it has no part of {self.tried.kind}")
        return spec

    @cached_property
    def terms(self) -> Terms:
        return terms_of(*self.spec.plan.nodes()).plus(SUMMED)

    def fresh(self, number: int = 0, of: Model | None = None) -> Model:
        """The values of the model, or of another of its spec, in a copy whose parameters and buffers may be changed,
        and nothing else: it is the same module whenever a law, or the next, asks for that `number`.
        """
        while len(self._spares) <= number:
            self._spares.append(copy.deepcopy(self.model))
        spare, state = self._spares[number], (self.model if of is None else of).state_dict()
        spare.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, each in spare.state_dict().items():
                each.copy_(state[name])
        return spare.train()

    @cached_property
    def objective(self) -> Objective:
        return trainer(self.model)[0]

    @cached_property
    def batch(self) -> TokenBatch:
        """Rows of tokens, some packed, some padded at their ends."""
        return self.rows("batch")

    def rows(self, label: str, **options: Any) -> TokenBatch:
        """Rows drawn under a label; options as in `shapes`."""
        return made(self.draw(label, shapes(**options)), self.spec.model.vocab_size)

    # What is computed

    def results(self, model: Model, batch: TokenBatch, *, sides: bool = True) -> dict[str, Tensor]:
        """Logits and predictions at real tokens, losses and counts, and the gradients of all losses together; without
        `sides` those of the objective alone.
        """
        ids, valid, documents, positions = batch
        told = {"valid": valid, "documents": documents, "positions": positions}
        model.zero_grad(set_to_none=True)
        output: ModelOutput = model(ids, **told, phase="train", predict=model.predictor is not None)
        found = {"logits": output.logits if valid is None else output.logits[valid]}
        total, found["weight"] = self.objective(output, batch.seen())
        found["loss"] = total
        for depth, each in enumerate(output.predictions, 1):
            loss, weight = self.objective(ModelOutput(each.logits, each.hidden), each.batch)
            found |= {f"prediction {depth}: loss": loss, f"prediction {depth}: weight": weight}
            total = total + loss * each.share
        if sides:
            for path, loss in output.aux.losses.items():
                found[path] = loss.sum()
                total = total + loss.sum()
        found |= output.aux.counts
        torch.autograd.backward(total)
        found = {name: each.detach() for name, each in found.items()}
        return found | gradients_of(model)

    def measured(self, label: str, run: Callable[[Model], Results]) -> Measured:
        """What `run` gives of the model, and its conditions. A label is measured once.

        An ill-conditioned case is rejected.
        """
        if label not in self._measured:
            self._measured[label] = self.measure(run, self.model, self.error_in(torch.float64))
        return self._measured[label]

    def error_in(self, dtype: torch.dtype) -> float:
        """The relative error of a result of condition 1."""
        return self.terms.error(dtype)

    def measure(self, run: Callable[[Model], Results], model: Model, step: float) -> Measured:
        """What `run` gives of a model in float64, and its conditions: by how much more than `step` a result changes
        when every parameter is moved by that much.
        """
        values = run(model)
        for name, each in values.items():
            if each.is_floating_point():
                self.finite(each, name)
        generator = torch.Generator().manual_seed(0)
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        conditions: dict[str, float] = {}
        try:
            for _ in range(2):
                with torch.no_grad():
                    for p in model.parameters():
                        own = max(step, 4 * roundoff(p.dtype))
                        p.mul_(1 + own * torch.randn(p.shape, generator=generator, dtype=p.dtype))
                there = run(model)
                for name, scale in scales(values).items():
                    changed = float(there[name].shape != values[name].shape) or gap(there[name], values[name])
                    if scale:
                        conditions[name] = max(1.0, conditions.get(name, 1.0), changed / scale / step)
        finally:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(kept[name])
        worst = max(conditions.values(), default=1.0)
        # Parameters of a dtype that their part fixes can not be moved by less than it resolves.
        moved = max([step, *(4 * roundoff(p.dtype) for p in model.parameters())])
        if not worst * step / moved <= WORST_CONDITION or not worst * step <= WORST_BOUND:
            self.draw.reject(f"it magnifies a relative change {worst:.3g} times")
        of_gradients = max((c for name, c in conditions.items() if name.startswith(GRADIENT)), default=1.0)
        conditions |= {name: of_gradients for name in values if name.startswith(GRADIENT)}
        return Measured(values=values, conditions=conditions)

    # What must hold

    def agree(
        self,
        found: Results,
        wanted: Measured,
        told: str,
        *,
        dtype: torch.dtype = torch.float64,
        times: float = 1.0,
    ) -> None:
        """All results are those wanted, within rounding in `dtype`; what counts is equal. A missing one is zero, such
        as that of a predictor's depth that no row is long enough for.

        `times` is by how much more the results may differ than once computed.
        """
        for name in sorted({*found} ^ {*wanted.values}):
            if (found if name in found else wanted.values)[name].any():
                raise LawBroken(f"{told}: only one of the two has {name}")
        for name, scale in scales(wanted.values).items():
            if name not in found:
                continue
            one, other = found[name], wanted.values[name]
            if one.shape != other.shape:
                raise LawBroken(
                    f"{told}: {name} has shape {tuple(one.shape)}, must have {tuple(other.shape)}"
                )
            if not other.is_floating_point():
                self.equal(one, other, f"{told}: {name}")
                continue
            bound = times * self.error_in(dtype) * wanted.conditions.get(name, 1.0) * scale
            self.within(gap(one, other), bound, f"{told}: {name}")

    def same(self, found: Results, wanted: Results, told: str) -> None:
        """All results are those wanted, bit by bit."""
        if found.keys() != wanted.keys():
            odd = sorted({*found} ^ {*wanted})
            raise LawBroken(f"{told}: only one of the two has {odd[0]}")
        for name, each in wanted.items():
            self.equal(found[name], each, f"{told}: {name}")


def model_law(
    name: str, told: str, *, kills: str, examples: int = 15
) -> Callable[[Callable[[ModelCase], None]], Law]:
    """A law of whole models, as `law` has it."""
    made = law(MODEL, name, told, kills=kills, examples=examples)
    return cast("Callable[[Callable[[ModelCase], None]], Law]", made)


def gradients_of(model: Model) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, by name."""
    return {f"{GRADIENT}{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def scales(values: Results) -> dict[str, float]:
    """What errors are relative to: a tensor's largest magnitude; of gradients no less than a share of that of all."""
    floor = FLOOR * size({name: each for name, each in values.items() if name.startswith(GRADIENT)})
    return {
        name: max(size(each.double()), floor if name.startswith(GRADIENT) else 0.0)
        for name, each in values.items()
    }


@st.composite
def shapes(
    draw: st.DrawFn,
    *,
    rows: tuple[int, int] = (1, ROWS),
    tokens: tuple[int, int] = (2, TOKENS),
    packed: bool = True,
    padded: bool = True,
) -> dict[str, Any]:
    """Rows as plain data: how many tokens, padding at both ends of each row, where documents start; a seed for ids."""
    count, length = draw(st.integers(*rows)), draw(st.integers(*tokens))
    found: dict[str, Any] = {"rows": count, "tokens": length, "seed": draw(SEEDS)}
    if padded and draw(st.booleans()):
        ends = st.tuples(st.integers(0, length), st.integers(0, length)).filter(lambda e: sum(e) <= length)
        found["padding"] = [list(draw(ends)) for _ in range(count)]
    if packed and length > 1 and draw(st.booleans()):
        starts = st.lists(st.integers(1, length - 1), max_size=3, unique=True)
        found["starts"] = [draw(starts) for _ in range(count)]
    return found


def made(shape: Mapping[str, Any], vocabulary: int) -> TokenBatch:
    """The rows of a shape."""
    rows, tokens = shape["rows"], shape["tokens"]
    generator = torch.Generator().manual_seed(shape["seed"])
    ids = torch.randint(vocabulary, (rows, tokens), generator=generator)
    valid = documents = None
    if "padding" in shape:
        valid = torch.ones(rows, tokens, dtype=torch.bool)
        for row, (left, right) in enumerate(shape["padding"]):
            valid[row, :left] = False
            valid[row, tokens - right :] = False
    if "starts" in shape:
        documents = torch.zeros(rows, tokens, dtype=torch.int64)
        for row, starts in enumerate(shape["starts"]):
            documents[row, starts] = 1
        documents = documents.cumsum(1)
    return TokenBatch(ids, valid, documents)
