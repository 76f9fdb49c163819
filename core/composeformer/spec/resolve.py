"""From a document to parts: names and tables become configured components, every problem is gathered.

The rules of the spec language: `[slot]` with a `kind` is one component named like its slot, `[slot.name]`
names several; a field that takes a part accepts a name, `{ use = "name", ... }`, or a table with `kind`; an
absent one is the spec's only component of that slot, or what the plugins register as the default.

A part may be stated in several tables, a refinement above what it refines; `paths` lists them, the nearest
first. What failed once is told once: whatever uses it fails in silence.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from composeformer.config import LAYER, Config, FieldFacts, check, facts_of
from composeformer.contracts import (
    PHASES,
    SINGLE,
    SLOTS,
    SUBLAYERS,
    Implementation,
    LayerParts,
    Part,
    Phase,
)
from composeformer.errors import ComposeError, Problem, SpecError, nearest, one_of
from composeformer.registry import Contested, Registry, UnknownKind
from composeformer.spec.document import Document
from composeformer.spec.merge import merged_tables, names_another
from composeformer.spec.scanner import Path, Refused, Unreadable, dotted, read_key

Paths = tuple[Path, ...]
Table = Mapping[str, Any]

RESERVED = ("kind", "implementation")
MAX_PROBLEMS = 1000
MAX_PARTS = 20_000
MAX_OPEN = 32


class Resolver:
    """Resolves one document against a registry; problems gather in `problems`."""

    def __init__(self, document: Document, registry: Registry) -> None:
        self.document = document
        self.registry = registry
        self.problems: list[Problem] = []
        self.failures = 0  # things that can not be used, told now or before
        self._told: set[tuple[str, str, str]] = set()
        self._unclear: set[str] = set()  # slots of whose table it is not known what it names
        self._parts: dict[tuple[str, str], Part | None] = {}
        self._defaults: dict[str, Part | None] = {}
        self._open: list[tuple[str, str]] = []
        self._cycles: set[frozenset[tuple[str, str]]] = set()
        self._count = 0
        self._tables: dict[str, dict[str, tuple[Path, Table]]] = {slot: self._named(slot) for slot in SLOTS}

    def problem(
        self, path: Path, found: object, allowed: str, near: str | None = None, *, fatal: bool = True
    ) -> None:
        """Notes a finding once. One that is not `fatal` leaves its table usable, for further checks."""
        self.failures += fatal
        key = (dotted(path), repr(found), allowed)
        if key not in self._told:
            self._told.add(key)
            shown = None if isinstance(found, dict | list) else found
            self.problems.append(Problem(dotted(path), shown, allowed, near, self.document.source(path)))
        if len(self.problems) >= MAX_PROBLEMS:
            raise self.error()

    def error(self) -> SpecError:
        """All problems from top to bottom, first those of the file that was asked for."""
        own = self.document.source(())
        sources = [own, *(problem.source for problem in self.problems)]
        files = list(dict.fromkeys(source.file for source in sources if source is not None))

        def place(problem: Problem) -> tuple[int, int]:
            source = problem.source
            return (-1, 0) if source is None else (files.index(source.file), source.line or 0)

        return SpecError(sorted(self.problems, key=place))

    def config(self, cls: type[Config], path: Path) -> Any:
        """A table that the core owns, or None when it has problems."""
        data = self.document.data.get(str(path[-1]), {})
        if not isinstance(data, dict):
            self.problem(path, data, "must be a table")
            return None
        return self._configured(cls, data, (path,), ())

    def named(self) -> dict[str, dict[str, Part | None]]:
        """Every component the spec names, by slot and name, used or not."""
        tables = self._tables
        return {slot: {name: self._use(slot, name) for name in tables[slot]} for slot in tables}

    def single(self, slot: str) -> Part | None:
        """The one component of a slot that a model has one of: as named, or the registered default."""
        if slot in self._unclear:
            self.failures += 1
            return None
        tables = self._tables[slot]
        return self._use(slot, next(iter(tables))) if tables else self._registered(slot)

    def reference(self, slot: str, found: object, paths: Paths, optional: bool = False) -> Part | None:
        """What a field that takes a part holds; None with a failure, or where an `optional` one is absent."""
        if found is None:
            return None if optional else self._default(slot, paths[-1])
        if isinstance(found, str):
            return self._use(slot, found, paths[0]) if self._known(slot, found, paths[0]) else None
        if not isinstance(found, dict):
            self.problem(paths[0], found, f"must be the name of a {slot}, or a table with `use` or `kind`")
            return None
        if "use" in found:
            return self._refined(slot, found, paths)
        return self._table(slot, found, paths, dotted(paths[0]))

    def layer(self, entry: Table, paths: Paths) -> LayerParts | None:
        """What a table with a mixer and an ffn joins; None with a failure."""
        before = self.failures
        parts: dict[str, Part | None] = {}
        for slot in SUBLAYERS:
            found, here = entry.get(slot), self._below(paths, slot)
            if found is not False and isinstance(found, bool | int | float | list):
                allowed = f"must be the name of a {slot}, a table with `use` or `kind`, or false for none"
                self.problem(here[0], found, allowed)
                parts[slot] = None
            else:
                parts[slot] = None if found is False else self.reference(slot, found, here)
        if self.failures > before:
            return None
        if not any(parts.values()):
            self.problem(paths[0], None, "a layer needs a mixer or an ffn")
            return None
        return LayerParts(mixer=parts["mixer"], ffn=parts["ffn"])

    def place(self, paths: Paths, field: str, otherwise: int = 0) -> Path:
        return place(self.document, paths, field, otherwise)

    # Names.

    def _named(self, slot: str) -> dict[str, tuple[Path, Table]]:
        found = self.document.data.get(slot)
        if found is None:
            return {}
        several = f", or [{slot}.NAME] for each of several" if slot not in SINGLE else ""
        if not isinstance(found, dict):
            self._unclear.add(slot)
            self.problem((slot,), found, f"must be a table: [{slot}] with a kind{several}")
            return {}
        if "kind" in found:
            return self._one(slot, found)
        plain = [key for key, value in found.items() if not isinstance(value, dict)]
        if slot in SINGLE or plain:
            self._unclear.add(slot)
            name = next(iter(found), None)
            if plain or name is None or not isinstance(found[name], dict) or "kind" not in found[name]:
                self._needs_kind(slot, found, ((slot,),))
            else:
                allowed = f"a model has one {slot}, which has no name: write [{slot}] with the kind"
                self.problem((slot, name), None, allowed)
            return {}
        return {name: ((slot, name), table) for name, table in found.items()}

    def _one(self, slot: str, found: Table) -> dict[str, tuple[Path, Table]]:
        """`[slot]` with a kind. Tables beside it that its kind does not know can only be meant as names."""
        tables: dict[str, tuple[Path, Table]] = {slot: ((slot,), found)}
        try:
            facts = facts_of(self.registry.get(slot, str(found["kind"])).config)
        except ComposeError:
            return tables
        known = (*facts, *RESERVED)
        beside = [k for k, v in found.items() if isinstance(v, dict) and k not in known and "kind" in v]
        if slot in SINGLE or not beside:
            return tables
        self._unclear.add(slot)
        name = beside[0]
        allowed = (
            f"[{slot}] with a kind is the only {slot}, and {dotted((slot, name))} can not stand beside it; "
            f"name each as [{slot}.NAME]"
        )
        self.problem((slot, name), None, allowed)
        tables[slot] = ((slot,), {key: value for key, value in found.items() if key not in beside})
        return tables | {name: ((slot, name), found[name]) for name in beside}

    def _known(self, slot: str, name: str, path: Path) -> bool:
        tables = self._tables[slot]
        if name in tables:
            return True
        if slot in self._unclear:
            self.failures += 1
            return False
        owners = [other for other in SLOTS if name in self._tables[other]]
        allowed = f"no {slot} has this name; allowed: {one_of(tables)}"
        allowed += f" ({name!r} is a {owners[0]})" if owners else ""
        self.problem(path, name, allowed, None if owners else nearest(name, tables))
        return False

    def _use(self, slot: str, name: str, where: Path | None = None) -> Part | None:
        """The component that the spec names so; resolved once."""
        key = (slot, name)
        if key not in self._parts:
            path, table = self._tables[slot][name]
            if not self._enter(slot, name, path if where is None else where):
                return None
            self._parts[key] = self._table(slot, table, (path,), name)
            self._open.pop()
        elif self._parts[key] is None:
            self.failures += 1
        return self._parts[key]

    def _refined(self, slot: str, found: Table, paths: Paths) -> Part | None:
        base, where = found["use"], self.place(paths, "use")
        if "kind" in found:
            allowed = "what `use` names has its kind already; state `use` or `kind`, not both"
            self.problem(self.place(paths, "kind"), found["kind"], allowed)
            return None
        if not isinstance(base, str):
            self.problem(where, base, f"must be the name of a {slot}: {one_of(self._tables[slot])}")
            return None
        if not self._known(slot, base, where) or not self._enter(slot, base, where):
            return None
        path, table = self._tables[slot][base]
        refined = merged_tables(table, {key: value for key, value in found.items() if key != "use"})
        part = self._table(slot, refined, (*paths, path), base)
        self._open.pop()
        return part

    def _enter(self, slot: str, name: str, where: Path) -> bool:
        key = (slot, name)
        if key in self._open:
            chain = [*self._open[self._open.index(key) :], key]
            self.failures += 1
            if frozenset(chain) not in self._cycles:
                self._cycles.add(frozenset(chain))
                self.problem(where, name, f"refers to itself: {' -> '.join(dotted(link) for link in chain)}")
            return False
        if len(self._open) >= MAX_OPEN:
            self.problem(where, name, f"components refer to one another more than {MAX_OPEN} deep")
            return False
        self._open.append(key)
        return True

    # Defaults.

    def _default(self, slot: str, path: Path) -> Part | None:
        tables = self._tables[slot]
        if slot in self._unclear:
            self.failures += 1
            return None
        if len(tables) == 1:
            return self._use(slot, next(iter(tables)), path)
        if tables:
            told = f"is required: this spec names several {slot} components: {one_of(tables)}"
            self.problem(path, None, told)
            return None
        before = self.failures
        registered = self._registered(slot)
        if registered is None and self.failures == before:
            told = f"is required: this spec has no {slot}; add [{slot}] with a kind: "
            self.problem(path, None, told + one_of(self.registry.kinds(slot)))
        return registered

    def _registered(self, slot: str) -> Part | None:
        if slot not in self._defaults:
            self._defaults[slot] = None
            try:
                component = self.registry.default(slot)
            except Contested as contested:
                self.problem((slot,), None, contested.allowed)
                return None
            if component is None:
                return None
            self._defaults[slot] = self._table(slot, {"kind": component.kind}, ((slot,),), slot)
        return self._defaults[slot]

    # Tables.

    def _table(self, slot: str, table: Table, paths: Paths, name: str) -> Part | None:
        self._count += 1
        if self._count > MAX_PARTS:
            told = f"more than {MAX_PARTS} parts refer to one another"
            raise ComposeError(f"{self.document.source(())}: {told}")
        kind = table.get("kind")
        if not isinstance(kind, str):
            self._needs_kind(slot, table, paths)
            return None
        try:
            component = self.registry.get(slot, kind)
        except (UnknownKind, Contested) as error:
            near = error.nearest if isinstance(error, UnknownKind) else None
            self.problem(self.place(paths, "kind"), kind, error.allowed, near)
            return None
        if "use" in table and "use" not in facts_of(component.config):
            allowed = "unknown key; `use` refines a component where one is taken, and has no kind beside it"
            self.problem(self.place(paths, "use"), table["use"], allowed)
            table = {key: value for key, value in table.items() if key != "use"}
        choice = self._implementation(component.implementations, table.get("implementation", "auto"), paths)
        config = self._configured(component.config, table, paths, RESERVED)
        if config is None or choice is None:
            return None
        return Part(
            slot=slot,
            kind=kind,
            config=config,
            component=component,
            name=name,
            paths=paths,
            implementation=choice,
        )

    def _needs_kind(self, slot: str, table: Table, paths: Paths) -> None:
        kinds = one_of(self.registry.kinds(slot))
        if "kind" in table:
            self.problem(self.place(paths, "kind"), table["kind"], f"must be the kind of a {slot}: {kinds}")
            return
        inline = paths[-1][0] != slot
        words = ("kind", "use") if inline else ("kind",)
        fields = {name for c in self.registry if c.slot == slot for name in facts_of(c.config)}
        for key in table:
            near = nearest(key, words)
            if near is not None and key not in ("use", *fields):
                allowed = f"unknown key; a {slot} needs `{near}`" + (f": {kinds}" if near == "kind" else "")
                self.problem((*paths[0], key), table[key], allowed, near)
                return
        if "use" in table:
            allowed = f"a named {slot} has a kind: {kinds}; `use` refines one where it is taken"
            self.problem((*paths[0], "use"), table["use"], allowed)
            return
        told = f"needs `use` with a name or `kind`: {kinds}" if inline else f"a {slot} needs a kind: {kinds}"
        self.problem(paths[0], None, told)

    def _implementation(
        self, offered: tuple[Implementation, ...], found: object, paths: Paths
    ) -> tuple[tuple[Phase, str], ...] | None:
        before = self.failures
        chosen: list[tuple[Phase, str]] = []
        wanted = found if isinstance(found, dict) else {}
        for key in wanted:
            if key not in PHASES:
                path = self.place(paths, dotted(("implementation", key)))
                told = f"unknown phase; allowed: {one_of(PHASES)}"
                self.problem(path, wanted[key], told, nearest(key, PHASES))
        for phase in PHASES:
            name = wanted.get(phase, "auto") if isinstance(found, dict) else found
            names = ["auto", *(i.name for i in offered if phase in i.phases)]
            if isinstance(name, str) and name in names:
                chosen.append((phase, name))
                continue
            field = f"implementation.{phase}" if isinstance(found, dict) else "implementation"
            allowed = f"no such implementation for {phase}; allowed: {one_of(names)}"
            near = nearest(name, names) if isinstance(name, str) and name not in names else None
            self.problem(self.place(paths, field), name, allowed, near)
            if not isinstance(found, dict):
                break
        return tuple(chosen) if self.failures == before else None

    def _configured(self, cls: type[Config], table: Table, paths: Paths, reserved: Iterable[str]) -> Any:
        def resolve(fact: FieldFacts, found: object, steps: Path) -> tuple[Any, list[Problem]]:
            # Problems of a part below go to the shared list, with sources of their own.
            below = self._below(paths, *steps)
            if fact.slot == LAYER:
                return self._layer(found, below), []
            if fact.by_kind:
                return self._by_kind(str(fact.slot), found, below), []
            return self.reference(str(fact.slot), found, below, fact.optional), []

        before = self.failures
        values, problems = check(cls, table, resolve, reserved)
        facts = facts_of(cls)
        for problem in problems:
            # An unknown key leaves the rest meaningful, so that it is checked too.
            unknown = problem.field in table and problem.field not in facts
            field = dotted((problem.field,)) if unknown else problem.field
            path = self.place(paths, field, -1)
            self.problem(path, problem.found, problem.allowed, problem.nearest, fatal=not unknown)
        return None if self.failures > before else cls(**values)

    def _layer(self, found: object, paths: Paths) -> LayerParts | None:
        if found is None:
            return None
        if not isinstance(found, dict):
            self.problem(paths[0], found, f"must be a table with {' and '.join(SUBLAYERS)}")
            return None
        for key in found:
            if key not in SUBLAYERS:
                told = f"unknown key; allowed: {one_of(SUBLAYERS)}"
                path = self.place(paths, dotted((key,)))
                self.problem(path, found[key], told, nearest(key, SUBLAYERS), fatal=False)
        return self.layer(found, paths)

    def _by_kind(self, slot: str, found: object, paths: Paths) -> Part | None:
        """What a field that takes a kind holds; None with a failure."""
        if isinstance(found, dict) and isinstance(found.get("kind"), str):
            return self._table(slot, found, paths, str(found["kind"]))
        kinds = self.registry.kinds(slot)
        told = f"must be a kind of {slot}, or a table with one as `kind`: {one_of(kinds)}"
        if isinstance(found, str) and found in kinds:
            return self._table(slot, {"kind": found}, paths, found)
        near = nearest(found, kinds) if isinstance(found, str) else None
        self.problem(paths[0], found, told, near)
        return None

    def _below(self, paths: Paths, *steps: str | int) -> Paths:
        """The places that state a field which takes a part, the nearest first."""
        found: list[Path] = []
        above: Any = None
        for path in paths:
            value = _at(self.document.data, (*path, *steps))
            if value is None:
                continue
            tables = isinstance(value, dict) and isinstance(above, dict)
            if found and not (tables and not names_another(value, above)):
                break
            found.append((*path, *steps))
            above = value
        return tuple(found) or ((*paths[-1], *steps),)


def place(document: Document, paths: Paths, field: str, otherwise: int = 0) -> Path:
    """Where a part's dotted field stands: in the nearest table that has it, else in `paths[otherwise]`."""
    steps = _steps(field)
    for known in (steps, steps[:1]):
        for path in paths:
            if (*path, *known) in document.sources:
                return (*path, *steps)
    return (*paths[otherwise], *steps)


def _at(value: Any, path: Path) -> Any:
    for step in path:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value


def _steps(field: str) -> Path:
    """A dotted field, as configs and errors write it, as a path."""
    try:
        parts, end = read_key(field)
    except (Unreadable, Refused):
        return (field,)
    if end < len(field):
        return (field,)
    return tuple(int(part) if part.isascii() and part.isdigit() else part for part in parts)
