"""Which component fills a slot, who brought it, and why one can not be had.

No order decides between two plugins that register the same slot and kind, or two defaults of a slot:
asking for what is contested is an error that names the owners and the way out. All else stays usable.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

import attrs

from composeformer.contracts import SLOTS, Component
from composeformer.errors import ComposeError, PluginError, Problem, nearest, one_of

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path

Status = Literal["loaded", "blocked", "failed"]


@attrs.frozen(eq=False, kw_only=True)
class PluginInfo:
    """What is known of one plugin, loaded or not.

    `name` is its entry point's name, `origin` the file of its module, or the entry point's value when
    it was not loaded. `requires` is its requirement on composeformer. `cause` says why it is blocked
    or failed; a loaded one may still have `conflicts` with others.
    """

    name: str
    distribution: str
    version: str | None
    origin: str
    status: Status
    cause: str | None = None
    components: tuple[Component, ...] = ()
    dialects: "tuple[Traversable | Path, ...]" = ()
    specs: "tuple[Traversable | Path, ...]" = ()
    topologies: "tuple[Traversable | Path, ...]" = ()
    hardware: "tuple[Traversable | Path, ...]" = ()
    requires: str | None = None
    conflicts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution}{' ' if self.version else ''}{self.version or ''})"

    @property
    def selector(self) -> str:
        """A name by which `--no-plugin` and COMPOSE_PLUGINS mean this plugin and no other."""
        return f"{self.distribution}:{self.name}"


class UnknownKind(ComposeError):
    """No plugin that is loaded registers this kind in this slot.

    `kinds` are those that exist, `nearest` the one most likely meant.
    """

    def __init__(self, slot: str, kind: str, kinds: Iterable[str], hints: Iterable[str] = ()) -> None:
        self.slot = slot
        self.kind = kind
        self.kinds = tuple(kinds)
        self.nearest = nearest(kind, self.kinds)
        self.allowed = "; ".join((f"unknown {slot} kind; allowed: {one_of(self.kinds)}", *hints))
        super().__init__(str(self.problem(f"{slot}.kind")))

    def problem(self, field: str = "kind") -> Problem:
        """The same as a finding of a validation, at `field`."""
        return Problem(field, self.kind, self.allowed, self.nearest)


class Contested(PluginError):
    """Several plugins register the same slot and kind, or each a default of a slot (`kind` is None)."""

    def __init__(self, slot: str, kind: str | None, owners: Iterable[PluginInfo]) -> None:
        self.slot = slot
        self.kind = kind
        self.owners = tuple(owners)
        ways = " or ".join(f"--no-plugin {name}" for name in _selectors(self.owners))
        what = "a default is registered" if kind is None else "registered"
        by = " and ".join(str(owner) for owner in self.owners)
        self.allowed = (
            f"{what} by plugins {by}; choose with {ways}, or by a list of plugins in COMPOSE_PLUGINS"
        )
        super().__init__(str(self.problem(slot if kind is None else f"{slot}.kind")))

    def problem(self, field: str = "kind") -> Problem:
        """The same as a finding of a validation, at `field`."""
        return Problem(field, self.kind, self.allowed)


def _selectors(owners: tuple[PluginInfo, ...]) -> list[str]:
    names = [owner.name for owner in owners]
    return [o.name if names.count(o.name) == 1 else o.selector for o in owners]


class Registry:
    """The components of a set of plugins, looked up by slot and kind.

    Iterating gives the components that can be had, in the order of the plugins. `infos` are the plugins
    given, with the conflicts among them; `contests` the errors that asking for a contested part raises.
    """

    def __init__(self, infos: Iterable[PluginInfo] = ()) -> None:
        infos = tuple(infos)
        self._entries: dict[tuple[str, str], list[tuple[Component, PluginInfo]]] = {}
        defaults: dict[str, list[tuple[Component, PluginInfo]]] = {}
        for info in infos:
            for component in info.components:
                self._entries.setdefault((component.slot, component.kind), []).append((component, info))
                if component.default:
                    defaults.setdefault(component.slot, []).append((component, info))
        self._defaults = {slot: entries[0][0].kind for slot, entries in defaults.items()}
        self._contests: dict[tuple[str, str | None], Contested] = {}
        for (slot, kind), entries in self._entries.items():
            if len(entries) > 1:
                self._contests[slot, kind] = Contested(slot, kind, (info for _, info in entries))
        for slot, entries in defaults.items():
            if len({component.kind for component, _ in entries}) > 1:
                self._contests[slot, None] = Contested(slot, None, (info for _, info in entries))
        self.infos = tuple(self._with_conflicts(info) for info in infos)
        seen = dict(zip(infos, self.infos))
        entries_of_all = [entry for entries in self._entries.values() for entry in reversed(entries)]
        self._owners = {id(component): seen[info] for component, info in entries_of_all}

    def _with_conflicts(self, info: PluginInfo) -> PluginInfo:
        lines = tuple(str(contest) for contest in self.contests if info in contest.owners)
        return attrs.evolve(info, conflicts=lines) if lines else info

    @property
    def contests(self) -> tuple[Contested, ...]:
        return tuple(self._contests.values())

    def get(self, slot: str, kind: str) -> Component:
        """The component of that kind. Raises UnknownKind, or Contested when several plugins have it."""
        self._settled(slot, kind)
        entries = self._entries.get((slot, kind))
        if entries is None:
            raise UnknownKind(slot, kind, self.kinds(slot), self._hints(slot))
        return entries[0][0]

    def kinds(self, slot: str) -> tuple[str, ...]:
        """The kinds of a slot that can be had, in the order of the plugins."""
        return tuple(component.kind for component in self if component.slot == slot)

    def default(self, slot: str) -> Component | None:
        """The component that a spec gets when it says nothing of the slot. Raises Contested."""
        self._settled(slot, None)
        kind = self._defaults.get(slot)
        return None if kind is None else self.get(slot, kind)

    def owner(self, component: Component) -> PluginInfo:
        """The plugin that registered it. Raises KeyError for a component of another registry."""
        try:
            return self._owners[id(component)]
        except KeyError:
            raise KeyError(f"{component.slot} {component.kind!r} is not of this registry") from None

    def find_owner(self, component: Component) -> PluginInfo | None:
        """The same, or None for a component of another registry."""
        return self._owners.get(id(component))

    def __iter__(self) -> Iterator[Component]:
        for (slot, kind), entries in self._entries.items():
            if (slot, kind) not in self._contests:
                yield entries[0][0]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return True

    def _settled(self, slot: str, kind: str | None) -> None:
        contest = self._contests.get((slot, kind))
        if contest is not None:
            # A fresh one each time: a raised exception keeps its traceback.
            raise Contested(contest.slot, contest.kind, contest.owners)

    def _hints(self, slot: str) -> list[str]:
        """What may explain that a kind is missing: no such slot, or a plugin that is not there."""
        if slot not in SLOTS:
            return [f"{slot!r} is no slot; slots: {one_of(SLOTS)}"]
        contested = [kind for s, kind in self._contests if s == slot and kind is not None]
        hints = [f"contested: {one_of(contested)}"] if contested else []
        failed = [str(info) for info in self.infos if info.status == "failed"]
        blocked = [str(info) for info in self.infos if info.status == "blocked"]
        hints += [f"it may be of a plugin that failed to load: {one_of(failed)}"] if failed else []
        return hints + ([f"it may be of a plugin that is blocked: {one_of(blocked)}"] if blocked else [])
