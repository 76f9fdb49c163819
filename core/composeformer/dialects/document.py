"""From a table of parts for every layer to a spec as a person would write it.

Parts inside parts become named components, said once; layers of one kind share a component and refine it
where they differ; equal neighbours become one `[[layers]]` entry, and a repeating block one pattern.
"""

from collections.abc import Mapping
from typing import Any

from composeformer.config import LAYER, facts_of
from composeformer.dialects.reading import Tree
from composeformer.registry import Registry

Table = dict[str, Any]


def document(tree: Tree, registry: Registry) -> Table:
    """The nameless spec of a tree as `reading.tree` makes it."""
    lifted = _Lifted(registry)
    lifted.gather(tree)
    made: Table = {"format": 1, "model": tree["model"]}
    ends = {slot: lifted.part(slot, table) for slot, table in tree.items() if slot not in ("model", "layers")}
    entries: list[Table] = [{} for _ in tree["layers"]]
    sublayers: Table = {}
    for slot in ("mixer", "ffn"):
        parts = [lifted.part(slot, layer[slot]) if slot in layer else None for layer in tree["layers"]]
        sublayers |= _shared(slot, parts, entries)
    return {**made, **lifted.components(), **ends, **sublayers, "layers": _runs(entries)}


class _Lifted:
    """The parts that fields hold, by slot, each distinct one with a name."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.parts: dict[str, list[tuple[str, Table]]] = {}

    def gather(self, tree: Tree) -> None:
        for slot, table in tree.items():
            if slot not in ("model", "layers"):
                self._below(slot, table)
        for layer in tree["layers"]:
            for slot, table in layer.items():
                self._below(slot, table)

    def _below(self, slot: str, table: Mapping[str, Any]) -> None:
        for field, inner in self._inner(slot, table):
            self._below(inner, table[field])
            known = self.parts.setdefault(inner, [])
            if all(each != table[field] for _, each in known):
                taken = {name for name, _ in known}
                name = next(n for n in (field, *(f"{field}{i}" for i in range(2, 99))) if n not in taken)
                known.append((name, table[field]))

    def _inner(self, slot: str, table: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The fields of a part that hold parts, each with its slot."""
        facts = facts_of(self.registry.get(slot, table["kind"]).config)
        held = [(field, facts[field].slot) for field in table if field in facts]
        return [(field, inner) for field, inner in held if inner is not None and inner != LAYER]

    def part(self, slot: str, table: Mapping[str, Any]) -> Table:
        """The table with names for the parts in it; the only part of its slot needs no mention."""
        facts = facts_of(self.registry.get(slot, table["kind"]).config)
        made = dict(table)
        for field, inner in self._inner(slot, table):
            known = self.parts[inner]
            name = next(n for n, each in known if each == table[field])
            if len(known) > 1:
                made[field] = name
            elif facts[field].optional:
                made[field] = inner
            else:
                del made[field]
        return made

    def components(self) -> Table:
        made: Table = {}
        for slot, known in self.parts.items():
            tables = {name: self.part(slot, table) for name, table in known}
            made[slot] = next(iter(tables.values())) if len(tables) == 1 else tables
        return made


def _shared(slot: str, parts: list[Table | None], entries: list[Table]) -> Table:
    """Named components for a slot of the layers; `entries` get their references."""
    distinct: list[Table] = []
    for part in parts:
        if part is not None and part not in distinct:
            distinct.append(part)
    bases: list[tuple[str, Table]] = []
    references: list[Any] = []
    for part in distinct:
        base = next((b for b in bases if _refines(part, b[1])), None)
        if base is None:
            # A later part may turn out to be what this one refines: take the smallest of the kind.
            smallest = min((p for p in distinct if _refines(part, p)), key=len)
            taken = {name for name, _ in bases}
            kind = str(part["kind"])
            name = next(n for n in (kind, *(f"{kind}{i}" for i in range(2, 9999))) if n not in taken)
            base = (name, smallest)
            bases.append(base)
        change = {key: value for key, value in part.items() if base[1].get(key) != value}
        references.append({"use": base[0], **change} if change else base[0])
    if len(bases) == 1:
        for index, reference in enumerate(references):
            references[index] = {**reference, "use": slot} if isinstance(reference, dict) else None
    for entry, part in zip(entries, parts, strict=True):
        reference = False if part is None else references[distinct.index(part)]
        if reference is not None:
            entry[slot] = reference
    if not bases:
        return {}
    return {slot: bases[0][1] if len(bases) == 1 else dict(bases)}


def _refines(part: Table, base: Table) -> bool:
    """A refinement keeps the kind, and can change or add fields but not remove any."""
    return part["kind"] == base["kind"] and base.keys() <= part.keys()


def _runs(entries: list[Table]) -> list[Table]:
    """Equal neighbours as one entry; a block that repeats to the end as one pattern."""
    total = len(entries)
    for period in range(2, total // 2 + 1):
        times, rest = divmod(total, period)
        if rest == 0 and entries != entries[:1] * total and entries == entries[:period] * times:
            return [{"repeat": times, "layers": _runs(entries[:period])}]
    runs: list[tuple[int, Table]] = []
    for entry in entries:
        if runs and runs[-1][1] == entry:
            runs[-1] = (runs[-1][0] + 1, entry)
        else:
            runs.append((1, entry))
    return [{"repeat": count, **entry} for count, entry in runs]
