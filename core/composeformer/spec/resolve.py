"""From a document to parts: names and tables become configured components, every problem is gathered.

The rules of the spec language: `[slot]` with a `kind` is one component named like its slot, `[slot.name]`
names several; a field that takes a part accepts a name, `{ use = "name", ... }`, or a table with `kind`; an
absent one is the spec's only component of that slot, or what the plugins register as the default.
"""

from collections.abc import Mapping
from typing import Any, cast

import attrs

from composeformer.config import Config, FieldFacts, check
from composeformer.contracts import PHASES, SINGLE, SLOTS, Part, Phase
from composeformer.errors import ComposeError, Problem, nearest, one_of
from composeformer.registry import Registry, UnknownKind
from composeformer.spec.document import Document

Path = tuple[str | int, ...]
RESERVED = ("kind", "use", "implementation")
MAX_LAYERS = 10_000
SUBLAYERS = ("mixer", "ffn")


def dotted(path: Path) -> str:
    """A document path as errors and `--set` write it."""
    return ".".join(str(step) for step in path)


@attrs.frozen
class LayerParts:
    """What one layer joins; None where the layer has none."""

    mixer: Part | None
    ffn: Part | None

    def items(self) -> list[tuple[str, Part]]:
        return [(slot, part) for slot, part in (("mixer", self.mixer), ("ffn", self.ffn)) if part is not None]


class Resolver:
    """Resolves one document against a registry; problems gather in `problems`."""

    def __init__(self, document: Document, registry: Registry) -> None:
        self.document = document
        self.registry = registry
        self.problems: list[Problem] = []
        self._tables: dict[str, dict[str, tuple[Path, dict[str, Any]]]] = {slot: self._named(slot) for slot in SLOTS}
        self._parts: dict[tuple[str, str], Part | None] = {}
        self._open: list[tuple[str, str]] = []

    def problem(self, path: Path, found: object, allowed: str, near: str | None = None) -> None:
        self.problems.append(Problem(dotted(path), found, allowed, near, self.document.source(path)))

    def config(self, cls: type[Config], path: Path) -> Any:
        """A table that the core owns, or None when it has problems."""
        data = self.document.data.get(str(path[-1]), {})
        if not isinstance(data, dict):
            self.problem(path, data, "must be a table")
            return None
        return self._configured(cls, data, (path,), ())

    def named(self) -> dict[str, dict[str, Part | None]]:
        """Every component the spec names, by slot and name, used or not."""
        return {slot: {name: self.use(slot, name) for name in tables} for slot, tables in self._tables.items()}

    def single(self, slot: str) -> Part | None:
        """The one component of a slot that a model has one of: as named, or the registered default."""
        tables = self._tables[slot]
        if tables:
            return self.use(slot, next(iter(tables)))
        return self._registered(slot)

    def use(self, slot: str, name: str) -> Part | None:
        """The component that the spec names so; resolved once."""
        key = (slot, name)
        if key not in self._parts:
            path, table = self._tables[slot][name]
            if key in self._open:
                self.problem(path, name, "refers to itself")
                return None
            self._open.append(key)
            self._parts[key] = self._table(slot, table, (path,), name)
            self._open.pop()
        return self._parts[key]

    def reference(self, slot: str, found: object, path: Path, optional: bool = False) -> Part | None:
        """What a field that takes a part holds."""
        tables = self._tables[slot]
        if found is None:
            return None if optional else self._default(slot, path)
        if isinstance(found, str):
            if found not in tables:
                near = nearest(found, tables)
                self.problem(path, found, f"no {slot} has this name; allowed: {one_of(tables)}", near)
                return None
            return self.use(slot, found)
        if not isinstance(found, dict):
            self.problem(path, found, f"must name a {slot}, or be a table with `use` or `kind`")
            return None
        if "use" not in found:
            return self._table(slot, found, (path,), dotted(path))
        base = found["use"]
        if not isinstance(base, str) or base not in tables:
            near = nearest(base, tables) if isinstance(base, str) else None
            self.problem((*path, "use"), base, f"no {slot} has this name; allowed: {one_of(tables)}", near)
            return None
        if "kind" in found:
            self.problem((*path, "kind"), found["kind"], "a refinement keeps the kind of what it uses")
            return None
        base_path, table = tables[base]
        refined = _merged(table, {key: value for key, value in found.items() if key != "use"})
        return self._table(slot, refined, (path, base_path), base)

    def layers(self) -> list[LayerParts] | None:
        """The layers in order, repeats expanded, or None when they have problems."""
        entries = self.document.data.get("layers")
        before = len(self.problems)
        if entries is None:
            self.problem(("layers",), None, "is required: an array of tables, one `[[layers]]` for each run of equal layers")
            return None
        expanded = self._entries(entries, ("layers",), 1, 0)
        return expanded if len(self.problems) == before else None

    def _entries(self, entries: object, path: Path, times: int, depth: int) -> list[LayerParts]:
        if not isinstance(entries, list) or not entries:
            self.problem(path, entries if not isinstance(entries, list | dict) else None, "must be a non-empty array of tables")
            return []
        layers: list[LayerParts] = []
        for index, entry in enumerate(entries):
            here = (*path, index)
            if not isinstance(entry, dict):
                self.problem(here, entry, "must be a table")
                continue
            repeat = entry.get("repeat", 1)
            if type(repeat) is not int or not 1 <= repeat <= MAX_LAYERS:
                self.problem((*here, "repeat"), repeat, f"must be an integer between 1 and {MAX_LAYERS}")
                continue
            allowed = ("repeat", "layers") if "layers" in entry else ("repeat", *SUBLAYERS)
            for key in entry:
                if key not in allowed:
                    self.problem((*here, key), None, f"unknown key; allowed: {one_of(allowed)}", nearest(key, allowed))
            if "layers" in entry:
                if depth >= 8:
                    self.problem((*here, "layers"), None, "patterns nest at most 8 deep")
                    continue
                block = self._entries(entry["layers"], (*here, "layers"), times * repeat, depth + 1)
            else:
                block = self._layer(entry, here)
            if (len(layers) + len(block) * repeat) * times > MAX_LAYERS:
                self.problem((*here, "repeat"), repeat, f"makes more than {MAX_LAYERS} layers")
                return []
            layers.extend(block * repeat)
        return layers

    def _layer(self, entry: Mapping[str, Any], path: Path) -> list[LayerParts]:
        before = len(self.problems)
        parts: dict[str, Part | None] = {}
        for slot in SUBLAYERS:
            found = entry.get(slot)
            parts[slot] = None if found is False else self.reference(slot, found, (*path, slot))
        if len(self.problems) == before and not any(parts.values()):
            self.problem(path, None, "a layer needs a mixer or an ffn")
        return [LayerParts(mixer=parts["mixer"], ffn=parts["ffn"])]

    def _named(self, slot: str) -> dict[str, tuple[Path, dict[str, Any]]]:
        found = self.document.data.get(slot)
        if found is None:
            return {}
        if not isinstance(found, dict):
            self.problem((slot,), found, "must be a table")
            return {}
        if "kind" in found or slot in SINGLE:
            return {slot: ((slot,), found)}
        tables: dict[str, tuple[Path, dict[str, Any]]] = {}
        for name, table in found.items():
            if isinstance(table, dict):
                tables[name] = ((slot, name), table)
            else:
                self.problem((slot, name), table, f"must be a table: [{slot}.NAME] names a component, [{slot}] with `kind` is the only one")
        return tables

    def _default(self, slot: str, path: Path) -> Part | None:
        tables = self._tables[slot]
        if len(tables) == 1:
            return self.use(slot, next(iter(tables)))
        if tables:
            self.problem(path, None, f"is required: this spec names several {slot} components: {one_of(tables)}")
            return None
        registered = self._registered(slot)
        if registered is None:
            kinds = one_of(self.registry.kinds(slot))
            self.problem(path, None, f"is required: this spec has no {slot}; add [{slot}] with a kind: {kinds}")
        return registered

    def _registered(self, slot: str) -> Part | None:
        key = (slot, "")
        if key not in self._parts:
            component = self.registry.default(slot)
            self._parts[key] = None if component is None else self._table(slot, {"kind": component.kind}, ((slot,),), slot)
        return self._parts[key]

    def _table(self, slot: str, table: Mapping[str, Any], paths: tuple[Path, ...], name: str) -> Part | None:
        kind = table.get("kind")
        kinds = self.registry.kinds(slot)
        if not isinstance(kind, str):
            here = paths[0] if kind is None else (*paths[0], "kind")
            self.problem(here, kind, f"a {slot} needs a kind: {one_of(kinds)}")
            return None
        try:
            component = self.registry.get(slot, kind)
        except UnknownKind as unknown:
            self.problem((*paths[-1], "kind"), kind, f"no {slot} of this kind is installed; allowed: {one_of(kinds)}", unknown.nearest)
            return None
        except ComposeError as error:
            self.problem((*paths[-1], "kind"), kind, " ".join(error.lines))
            return None
        implementation = self._implementation(component.implementations, table.get("implementation", "auto"), paths)
        config = self._configured(component.config, table, paths, RESERVED)
        if config is None or implementation is None:
            return None
        return Part(
            slot=slot, kind=kind, config=config, component=component, name=name, paths=paths, implementation=implementation
        )

    def _implementation(self, offered: Any, found: object, paths: tuple[Path, ...]) -> tuple[tuple[Phase, str], ...] | None:
        path = self.place(paths, "implementation")
        wanted = found if isinstance(found, dict) else dict.fromkeys(PHASES, found)
        before = len(self.problems)
        for phase, name in wanted.items():
            here = (*path, phase) if isinstance(found, dict) else path
            if phase not in PHASES:
                self.problem(here, name, f"unknown phase; allowed: {one_of(PHASES)}", nearest(phase, PHASES))
                continue
            names = ["auto", *(i.name for i in offered if phase in i.phases)]
            if name not in names:
                near = nearest(name, names) if isinstance(name, str) else None
                self.problem(here, name, f"no such implementation for {phase}; allowed: {one_of(names)}", near)
                break
        return cast(Any, tuple(wanted.items())) if len(self.problems) == before else None

    def place(self, paths: tuple[Path, ...], field: str) -> Path:
        """Where a part's field stands in the document: in the refinement, or in what it refines."""
        steps: Path = tuple(int(step) if step.isdigit() else step for step in field.split("."))
        for path in paths:
            if (*path, *steps) in self.document.sources or (*path, steps[0]) in self.document.sources:
                return (*path, *steps)
        return (*paths[0], *steps)

    def _configured(self, cls: type[Config], table: Mapping[str, Any], paths: tuple[Path, ...], reserved: tuple[str, ...]) -> Any:
        def resolve(facts: FieldFacts, found: object) -> tuple[Any, list[Problem]]:
            # Problems of a part below go to the shared list, with sources of their own.
            return self.reference(str(facts.slot), found, self.place(paths, facts.name), facts.optional), []

        before = len(self.problems)
        values, problems = check(cls, table, resolve, reserved)
        for problem in problems:
            path = self.place(paths, problem.field)
            self.problem(path, problem.found, problem.allowed, problem.nearest)
        # An unknown key leaves the rest meaningful, so that it is checked too; the spec fails all the same.
        broken = [p for p in self.problems[before:] if not p.allowed.startswith("unknown key")]
        return None if broken else cls(**values)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`; tables merge unless they name another kind or use."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        tables = isinstance(value, dict) and isinstance(old, dict)
        same = tables and "use" not in value and value.get("kind", old.get("kind")) == old.get("kind")
        merged[key] = _merged(old, value) if same else value
    return merged
