"""Tensors that differ, and conventions that explain it: what parts state of theirs, what holds of any tensor, or both.

Where a convention makes a tensor equal to the trusted one, to within the rounding of their dtype, the variant takes
that one. What is alike in several layers is one change.
"""

from collections.abc import Iterator
from itertools import combinations
from math import sqrt

import torch
from torch import Tensor

from composeformer.config import facts_of
from composeformer.contracts import Part
from composeformer.plan import Node
from composeformer.spec import Spec
from composeformer.store.bisecting.change import Change
from composeformer.store.bisecting.relations import Relation, relation
from composeformer.store.bisecting.ways import Tensors, Way, pairs, ways

PLAIN = "as it is"


def proposals(spec: Spec, tensors: Tensors) -> tuple[list[Change], list[str]]:
    """Changes of tensors, those that parts state first; and the tensors that differ and that nothing explains."""
    if not tensors.names:
        return [], []
    known: dict[str, list[Way]] = {}
    found = Found()
    for way in ways(spec, tensors):
        for name in way.names:
            known.setdefault(name, []).append(way)
        nearer = {name: tensors.nearer(name, value) for name, value in way.undo(tensors.ours).items()}
        values = {name: value for name, value in nearer.items() if value is not None}
        if len(values) < len(way.names):  # of two under each other's name one may be stored otherwise, too
            values = {name: value for name, value in values.items() if value is tensors.theirs[name]}
        if values:
            found.add((way.about, way.here, way.there), way.here, values)
    left = [name for name in tensors.names if not found.settles(name, tensors)]
    for name in left:
        two = pairs(name, known, tensors)
        if two is not None:
            first, last = two
            about, there = f"{first.about}, and {last.about}", f"{first.there}, and {last.there}"
            here = f"{first.here}, and {last.here}"
            found.add((about, here, there), here, {name: tensors.theirs[name]})
    left = [name for name in left if not found.settles(name, tensors)]
    _general(spec, tensors, left, known, found)
    return found.changes(), [name for name in tensors.names if not found.has(name)]


class Found:
    """Changes being gathered, those of one key as one."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str, str], tuple[str, dict[str, Tensor]]] = {}

    def add(self, key: tuple[str, str, str], here: str, values: dict[str, Tensor]) -> None:
        """What it is about, something that tells it from others, and how it is there; `here` in words."""
        self._groups.setdefault(key, (here, {}))[1].update(values)

    def has(self, name: str) -> bool:
        return any(name in values for _, values in self._groups.values())

    def settles(self, name: str, tensors: Tensors) -> bool:
        """Whether a change makes this tensor the trusted one."""
        return any(values.get(name) is tensors.theirs[name] for _, values in self._groups.values())

    def changes(self) -> list[Change]:
        return [
            Change(source="tensors", name=about, here=here, there=there, where=tuple(values), tensors=values)
            for (about, _, there), (here, values) in self._groups.items()
        ]


def _general(
    spec: Spec, tensors: Tensors, names: list[str], known: dict[str, list[Way]], found: Found
) -> None:
    """What relates tensors of any part: two of one part under each other's name, an order, a scale; and what relates
    one so when a way that its part states is undone.
    """
    left = set(names)
    for node in spec.plan.nodes():
        start = len(node.path) + 1
        own = [name for name, _ in node.tensors() if name in left]
        for first, second in combinations(own, 2):
            if _exchanged(first, second, tensors):
                about = f"{node.slot}.{first[start:]} and {second[start:]}"
                swapped = {first: tensors.theirs[first], second: tensors.theirs[second]}
                found.add((about, "swap", "as named"), "exchanged", swapped)
                left -= {first, second}
        for name in own:
            related = _related(name, f"{node.slot}.{name[start:]}", tensors, known) if name in left else None
            if related is not None:
                about, before, there, how = related
                here = f"{before}{how.told}{_number(how, node, spec, tensors.eps)}"
                key = how.sort if how.factor is None else here
                found.add((about, before + key, there), here, {name: tensors.theirs[name]})


def _related(
    name: str, label: str, tensors: Tensors, known: dict[str, list[Way]]
) -> tuple[str, str, str, Relation] | None:
    """What it is about, what comes first here, how it is there, and how our tensor, or that with a way undone, is
    related to the trusted one.
    """
    ours, theirs = tensors.ours[name], tensors.theirs[name].cpu()
    found = relation(ours.cpu(), theirs, tensors.eps)
    if found is not None:
        return label, "", PLAIN, found
    for way in known.get(name, ()):
        if way.names != (name,) or not tensors.possible(name, name):
            continue
        found = relation(way.undo(tensors.ours)[name].cpu(), theirs, tensors.eps)
        if found is None:  # the other way about: reordered first, and then transposed
            found = relation(ours.cpu(), way.redo(tensors.theirs)[name].cpu(), tensors.eps)
        if found is not None:
            about = f"{way.about}, and {label}"
            return about, f"{way.here}, and ", f"{way.there}, and {PLAIN}", found
    return None


def _exchanged(first: str, second: str, tensors: Tensors) -> bool:
    pairs = ((first, second), (second, first))
    return all(torch.equal(tensors.ours[a], tensors.theirs[b]) for a, b in pairs)


def _number(found: Relation, node: Node, spec: Spec, eps: float) -> str:
    """The value of the model that a scale is, in words: a factor may be applied where a tensor has it already."""
    if found.sort != "scale" or found.factor is None:
        return ""
    scale = abs(found.factor)
    for name, value in _numbers(node, spec):
        forms = {name: value, f"1 / {name}": 1 / value, f"sqrt({name})": sqrt(value)}
        forms[f"1 / sqrt({name})"] = 1 / sqrt(value)
        for told, number in forms.items():
            if number != 1 and abs(scale - number) <= eps * number:
                return f", which is {told}"
    return ""


def _numbers(node: Node, spec: Spec) -> Iterator[tuple[str, float]]:
    """The numbers of the function that the parts around a tensor, and in them, have; then the model's width."""
    around = [each for each in spec.plan.nodes() if f"{node.path}.".startswith(f"{each.path}.")]
    for outer in reversed(around):
        for each in outer.walk():
            yield from _fields(each.part)
    yield "hidden_size", float(spec.model.hidden_size)


def _fields(part: Part) -> Iterator[tuple[str, float]]:
    for name, facts in facts_of(type(part.config)).items():
        value = getattr(part.config, name)
        if facts.affects == "function" and type(value) in (int, float) and value > 0:
            yield f"{part.slot}.{name}", float(value)
