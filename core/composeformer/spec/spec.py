"""`Spec`: a validated architecture, from a TOML file, a shipped name, or Python data.

A spec that exists is valid: every value is checked, every part resolved and validated at its site. All
problems of a document are raised together, as one `SpecError`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

from composeformer.config import facts_of
from composeformer.contracts import SINGLE, SLOTS, Part
from composeformer.errors import DEFAULT, Problem, Source, SpecError, nearest, one_of
from composeformer.model_config import ModelConfig, TrainConfig
from composeformer.plan import Plan, Planner
from composeformer.plugins import current
from composeformer.registry import Registry
from composeformer.spec import inherit, overrides, writer
from composeformer.spec.document import Document, from_data, parse
from composeformer.spec.fingerprint import fingerprint
from composeformer.spec.resolve import LayerParts, Path, Resolver, dotted

FORMAT = 1
REQUIRED_SLOTS = ("embedding", "head", "residual", "precision")
TABLES = ("model", "train", "layers")
SCALARS = ("format", "name", "description", "source", "unverified")


class Spec:
    """A model on paper. Immutable; equal when its documents are."""

    def __init__(self, document: Document, registry: Registry | None = None) -> None:
        """Resolves a document whose inheritance is done. Raises SpecError with every problem found."""
        self.document = document
        self._registry = current().registry if registry is None else registry
        resolver = Resolver(document, self._registry)
        self._check_top(resolver)
        model = resolver.config(ModelConfig, ("model",))
        train = resolver.config(TrainConfig, ("train",))
        named = resolver.named()
        singles = {slot: resolver.single(slot) for slot in SINGLE if slot != "predictor" or slot in document.data}
        for slot in REQUIRED_SLOTS:
            if singles[slot] is None and slot not in document.data:
                resolver.problem((slot,), None, f"no installed plugin provides a default {slot}")
        layers = resolver.layers()
        if model is None or layers is None:
            raise SpecError(resolver.problems)
        self.model: ModelConfig = model
        self.train: TrainConfig = train
        self.layers: tuple[LayerParts, ...] = tuple(layers)
        self.singles: Mapping[str, Part | None] = singles
        self.named: Mapping[str, Mapping[str, Part | None]] = named
        plan = self._plan(resolver)
        if resolver.problems or plan is None:
            raise SpecError(resolver.problems)
        self.plan: Plan = plan

    @classmethod
    def load(cls, ref: "str | os.PathLike[str] | Spec", overrides: Sequence[str] = ()) -> "Spec":
        """A spec from a path or a shipped name, with `key=value` overrides."""
        if isinstance(ref, Spec):
            return ref.overridden(overrides)
        return cls(inherit.load(ref, overrides))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], label: str = "python") -> "Spec":
        """A spec from nested dictionaries and lists, `extends` included."""
        return cls(inherit.resolve(from_data(data, label), None))

    @classmethod
    def from_toml(cls, text: str, label: str = "python") -> "Spec":
        return cls(inherit.resolve(parse(text, label), None))

    def with_(self, changes: Mapping[str, Any] | None = None, /, **tables: Any) -> "Spec":
        """A changed copy: dotted paths to values, or whole tables by keyword, merged as `extends` merges."""
        document = self.document
        if tables:
            document = inherit.merge(document, from_data(tables))
        for path, value in (changes or {}).items():
            document = overrides.set_value(document, path, value, Source("python"))
        return Spec(document, self._registry)

    def overridden(self, settings: Sequence[str]) -> "Spec":
        """A copy with `--set` settings applied."""
        document = self.document
        for setting in settings:
            document = overrides.apply(document, setting)
        return Spec(document, self._registry) if settings else self

    @property
    def name(self) -> str:
        found = self.document.data.get("name")
        return found if isinstance(found, str) else FilePath(self.document.name).stem

    @property
    def unverified(self) -> tuple[str, ...]:
        """Paths of values for which the spec's author found no source."""
        found = self.document.data.get("unverified", ())
        return tuple(found) if isinstance(found, list) else ()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the function this architecture computes, given its weights."""
        return fingerprint(self)

    def single(self, slot: str) -> Part:
        """The model's only component of a slot. Raises SpecError where there is none."""
        part = self.singles.get(slot)
        if part is None:
            raise SpecError([Problem(slot, None, f"this needs [{slot}] with a kind: {one_of(self._registry.kinds(slot))}")])
        return part

    def to_dict(self) -> dict[str, Any]:
        """The resolved document: plain data, a copy."""
        return from_data(self.document.data).data

    def to_toml(self) -> str:
        """The resolved document as TOML; reading it gives an equal spec, comments are lost."""
        return writer.dumps(self.document.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.document.data == other.document.data

    def __hash__(self) -> int:
        return hash(self.to_toml())

    def __repr__(self) -> str:
        return f"Spec({self.name!r}, {len(self.layers)} layers, {self.fingerprint[:12]})"

    def values(self) -> Iterator[tuple[str, object, Source]]:
        """Every value by path with where it came from, defaults included."""
        done: set[str] = set()
        for path, value in _leaves(self.document.data, ()):
            done.add(dotted(path))
            yield dotted(path), value, self.document.source(path) or DEFAULT
        parts = [p for named in self.named.values() for p in named.values()] + [p for p in self.singles.values()]
        tables: list[tuple[str, Any]] = [("model", self.model), ("train", self.train)]
        tables += [(dotted(part.paths[0]), part.config) for part in parts if part is not None]
        for prefix, config in tables:
            for name in facts_of(type(config)):
                path = f"{prefix}.{name}"
                value = getattr(config, name)
                if path not in done and not any(d.startswith(path + ".") for d in done):
                    done.add(path)
                    yield path, value.name if isinstance(value, Part) else value, DEFAULT

    def _check_top(self, resolver: Resolver) -> None:
        data = self.document.data
        allowed = (*SCALARS, *TABLES, *SLOTS)
        for key, found in data.items():
            if key not in allowed:
                shown = found if not isinstance(found, dict | list) else None
                resolver.problem((key,), shown, f"unknown key; allowed: {one_of(allowed)}", nearest(key, allowed))
        stated = data.get("format", FORMAT)
        if type(stated) is not int or stated != FORMAT:
            resolver.problem(("format",), stated, f"must be {FORMAT}, the format this version reads")
        for key in ("name", "description", "source"):
            if key in data and not isinstance(data[key], str):
                resolver.problem((key,), data[key], "must be a string")
        unverified = data.get("unverified", [])
        if not isinstance(unverified, list) or not all(isinstance(path, str) for path in unverified):
            resolver.problem(("unverified",), unverified, "must be a list of paths")

    def _plan(self, resolver: Resolver) -> Plan | None:
        planner = Planner(self)
        width = self.model.hidden_size

        def single(slot: str) -> Any:
            part = self.singles[slot]
            return None if part is None else planner.node(part, slot, width)

        embedding, head, ends = single("embedding"), single("head"), single("residual")
        residual = self.singles["residual"]
        layers: list[dict[str, Any]] = []
        for index, layer in enumerate(self.layers):
            path = f"layers.{index}"
            nodes = {slot: planner.node(part, f"{path}.{slot}", width, index) for slot, part in layer.items()}
            if residual is not None:
                nodes["residual"] = planner.node(residual, f"{path}.residual", width, index, tuple(nodes))
            layers.append(nodes)
        predictor = single("predictor") if self.singles.get("predictor") is not None else None
        for part, problem in planner.problems:
            path: Path = resolver.place(part.paths, problem.field)
            resolver.problem(path, problem.found, problem.allowed, problem.nearest)
        if resolver.problems:
            return None
        return Plan(embedding=embedding, layers=layers, residual=ends, head=head, predictor=predictor)


def _leaves(value: object, path: Path) -> Iterator[tuple[Path, object]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(below, (*path, key))
    elif isinstance(value, list) and any(isinstance(element, dict) for element in value):
        for index, below in enumerate(value):
            yield from _leaves(below, (*path, index))
    else:
        yield path, value
