"""`Spec`: a validated architecture, from a TOML file, a shipped name, or Python data.

A spec that exists is valid: every value is checked, every part resolved and validated at its site. All
problems of a document are raised together, as one `SpecError`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

from composeformer.contracts import RUN_SLOTS, SINGLE, SLOTS, LayerParts, Part
from composeformer.cost_config import CostConfig
from composeformer.errors import InputError, Problem, Source, SpecError, nearest, one_of
from composeformer.model_config import ModelConfig, ParallelConfig, TrainConfig
from composeformer.plan import Node, Plan, Planner
from composeformer.plugins import current
from composeformer.precision import Formats
from composeformer.registry import Registry
from composeformer.site import Site
from composeformer.spec import inherit, overrides, unverified, writer
from composeformer.spec.document import Document, from_data, parse
from composeformer.spec.fingerprint import fingerprint
from composeformer.spec.layers import layers
from composeformer.spec.resolve import Resolver
from composeformer.spec.values import FORMAT, values

REQUIRED_SLOTS = ("embedding", "head", "residual", "precision")
TABLES = ("model", "train", "parallel", "cost", "layers")
SCALARS = ("format", "name", "description", "source", "unverified")


class Spec:
    """A model on paper. Immutable; equal when its documents are.

    `named` holds every component by slot and name, `singles` those that a model has one of; None where
    there is none. `plan` is the whole model with all its tensors, `registry` what its kinds were found in.
    """

    def __init__(self, document: Document, registry: Registry | None = None) -> None:
        """Resolves a document whose inheritance is done. Raises SpecError with every problem found."""
        self.document = document
        self.registry = current().registry if registry is None else registry
        resolver = Resolver(document, self.registry)
        self._check_top(resolver)
        unverified.check_marks(resolver)
        model = resolver.config(ModelConfig, ("model",))
        train = resolver.config(TrainConfig, ("train",))
        parallel = resolver.config(ParallelConfig, ("parallel",))
        cost = resolver.config(CostConfig, ("cost",))
        self.named: Mapping[str, Mapping[str, Part | None]] = resolver.named()
        self.singles: Mapping[str, Part | None] = self._singles(resolver)
        self.layers: tuple[LayerParts, ...] = tuple(layers(resolver))
        if model is None or not self.layers:
            raise resolver.error()
        self.model: ModelConfig = model
        self.train: TrainConfig = train
        self.parallel: ParallelConfig = parallel
        self.cost: CostConfig = cost
        plan = self._plan(resolver)
        if resolver.problems or plan is None:
            raise resolver.error()
        self.plan: Plan = plan
        self._check_run(resolver)

    @classmethod
    def load(cls, ref: "str | os.PathLike[str] | Spec", overrides: Sequence[str] = ()) -> "Spec":
        """A spec from a path or a shipped name, with `key=value` overrides. Raises ComposeError."""
        if isinstance(ref, Spec):
            return ref.overridden(overrides)
        return cls(inherit.load(ref, overrides))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], label: str = "python") -> "Spec":
        """A spec from nested dictionaries and lists, `extends` included. Raises ComposeError."""
        return cls(inherit.resolve(from_data(data, label), None))

    @classmethod
    def from_toml(cls, text: str, label: str = "python") -> "Spec":
        """A spec from TOML text, which errors call `label`. Raises ComposeError."""
        return cls(inherit.resolve(parse(text, label), None))

    def with_(self, changes: Mapping[str, Any] | None = None, /, **tables: Any) -> "Spec":
        """A changed copy: dotted paths to values, or whole tables by keyword, merged as `extends` merges.

        Raises ComposeError for a path without a place, and SpecError for what is no valid model.
        """
        if "extends" in tables:
            raise InputError("extends: can not be changed; load the other spec, or name it in from_dict")
        document = self.document
        if tables:
            document = inherit.merge(document, from_data(tables))
        for path, value in (changes or {}).items():
            document = overrides.set_value(document, path, value, Source("python"))
        return self._changed(document)

    def overridden(self, settings: Sequence[str]) -> "Spec":
        """A copy with `--set` settings applied. Raises as `with_` does."""
        return self._changed(overrides.apply_all(self.document, settings)) if settings else self

    @property
    def name(self) -> str:
        """As stated, else the file's."""
        found = self.document.data.get("name")
        return found if isinstance(found, str) else FilePath(self.document.name).stem

    @property
    def unverified(self) -> tuple[str, ...]:
        """Paths of values for which the spec's author found no source."""
        found = self.document.data.get("unverified", ())
        return tuple(found) if isinstance(found, list) else ()

    @cached_property
    def formats(self) -> Formats:
        """The number format of every tensor."""
        return Formats(self.single("precision"), self.plan, self.registry)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the function this architecture computes, given its weights."""
        return fingerprint(self)

    def single(self, slot: str) -> Part:
        """The model's only component of a slot. Raises SpecError where there is none, Contested where several
        plugins each bring a default.
        """
        part = self.singles.get(slot)
        if part is None:
            self.registry.default(slot)
            kinds = one_of(self.registry.kinds(slot))
            raise SpecError([Problem(slot, None, f"this needs [{slot}] with a kind: {kinds}")])
        return part

    def values(self) -> Iterator[tuple[str, object, Source]]:
        """Every value once, by path, with where it came from; defaults of what is used included."""
        return values(self)

    def to_dict(self) -> dict[str, Any]:
        """The resolved document: plain data, a copy."""
        return from_data(self.document.data).data

    def to_toml(self) -> str:
        """The resolved document as TOML; reading it gives an equal spec, comments are lost."""
        return writer.dumps(self.document.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.document.data == other.document.data

    def __hash__(self) -> int:
        return hash((self.document.data.get("name"), self.model))

    def __deepcopy__(self, memo: object) -> "Spec":
        return self  # immutable, and a copy's components would be of no registry

    def __repr__(self) -> str:
        # A test runner shows one that is only half made, too.
        made = f"{len(self.layers)} layers, {self.fingerprint[:12]}" if hasattr(self, "plan") else "not valid"
        return f"Spec({self.name!r}, {made})"

    def _changed(self, document: Document) -> "Spec":
        document = unverified.carried(self.document, document)
        return Spec(Document(document.data, document.sources, self.document.name), self.registry)

    def _check_top(self, resolver: Resolver) -> None:
        data = self.document.data
        allowed = (*SCALARS, *TABLES, *SLOTS)
        for key, found in data.items():
            if key not in allowed:
                told = f"unknown key; allowed: {', '.join(allowed)}"
                resolver.problem((key,), found, told, nearest(key, allowed), fatal=False)
        stated = data.get("format", FORMAT)
        if type(stated) is not int or stated != FORMAT:
            resolver.problem(("format",), stated, f"must be {FORMAT}, the format this version reads")
        for key in ("name", "description", "source"):
            if key in data and not isinstance(data[key], str):
                resolver.problem((key,), data[key], "must be a string")
        name = data.get("name")
        if isinstance(name, str) and not (name.strip() and name.isprintable()):
            resolver.problem(("name",), name, "must be a text of printable characters, not empty")

    def _singles(self, resolver: Resolver) -> dict[str, Part | None]:
        singles: dict[str, Part | None] = {}
        # What only a run needs, and is not stated, may be missing or contested until a run asks for it.
        aside = Resolver(self.document, self.registry)
        for slot in SINGLE:
            if slot in self.document.data or slot in REQUIRED_SLOTS:
                before = resolver.failures
                singles[slot] = resolver.single(slot)
                if singles[slot] is None and resolver.failures == before:
                    told = f"is required: no plugin that is loaded has a default {slot}"
                    resolver.problem((slot,), None, told)
            else:
                singles[slot] = aside.single(slot) if slot in RUN_SLOTS else None
        return singles

    def _check_run(self, resolver: Resolver) -> None:
        """What only the whole model can tell of how it is run. Raises SpecError with all of it."""
        for slot in RUN_SLOTS:
            part = self.singles[slot]
            if part is None or slot not in self.document.data:
                continue
            site = Site(path=slot, slot=slot, layer=None, width=self.model.hidden_size, spec=self)
            problems = list(part.config.validate(site))
            if slot == "precision":
                problems += self.formats.problems()
            for problem in problems:
                place = resolver.place(part.paths, problem.field)
                resolver.problem(place, problem.found, problem.allowed, problem.nearest)
        for problem in self.cost.problems():
            path = ("cost", *(int(step) if step.isdigit() else step for step in problem.field.split(".")))
            resolver.problem(path, problem.found, problem.allowed, problem.nearest)
        ranks = self.parallel.expert
        for role, linear in self.plan.linears.items():
            if linear.shard == "group" and linear.groups is not None and linear.groups % ranks:
                told = f"must divide the number of experts, {linear.groups} in {role.rpartition('.')[0]}"
                resolver.problem(("parallel", "expert"), ranks, told)
                break
        if resolver.problems:
            raise resolver.error()

    def _check_aliases(self, nodes: Sequence[Node | None], resolver: Resolver) -> None:
        """A shared tensor must be there, and of the same shape; two parts that never met may differ."""
        parts = [below for node in nodes if node is not None for below in node.walk()]
        own = {name: w.shape for part in parts for name, w in part.tensors() if w.same_as is None}
        for part in parts:
            for name, weight in part.tensors():
                if weight.same_as is None or own.get(weight.same_as) == weight.shape or resolver.problems:
                    continue
                there = f"has shape {own[weight.same_as]}" if weight.same_as in own else "does not exist"
                told = f"its {name} {weight.shape} is the tensor {weight.same_as}, which {there}"
                resolver.problem(resolver.place(part.part.paths, "kind"), part.part.kind, told)

    def _plan(self, resolver: Resolver) -> Plan | None:
        planner = Planner(self)
        width = self.model.hidden_size
        ends: dict[str, Node | None] = {}
        for slot in ("embedding", "residual", "head", "predictor"):
            part = self.singles[slot]
            ends[slot] = None if part is None else planner.node(part, slot, width)
        residual = self.singles["residual"]
        nodes: list[dict[str, Node | None]] = []
        for index, layer in enumerate(self.layers):
            path = f"layers.{index}"
            found = {slot: planner.node(part, f"{path}.{slot}", width, index) for slot, part in layer.items()}
            if residual is not None:
                found["residual"] = planner.node(residual, f"{path}.residual", width, index, tuple(found))
            nodes.append(found)
        for part, problem in planner.problems:
            place = resolver.place(part.paths, problem.field)
            resolver.problem(place, problem.found, problem.allowed, problem.nearest)
        self._check_aliases([*ends.values(), *(node for layer in nodes for node in layer.values())], resolver)
        embedding, end, head, predictor = ends.values()
        whole = [{slot: node for slot, node in layer.items() if node is not None} for layer in nodes]
        if resolver.problems or embedding is None or end is None or head is None:
            return None
        return Plan(embedding=embedding, layers=whole, residual=end, head=head, predictor=predictor)
