"""Tensors that differ, and conventions that explain it: what parts state of theirs, and what holds of any tensor.

A convention is proposed only where it brings a tensor to the trusted one, or at least twice as near: one that does not
would cost a forward and say nothing. Where it makes the two equal to within the rounding of their dtype, the variant
takes the trusted tensor itself.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from math import sqrt

import torch
from torch import Tensor

from composeformer.blame import blame, described
from composeformer.config import facts_of
from composeformer.contracts import Part
from composeformer.conventions import Convention, Order, Restored, Shift, Swap, inverse, wrong
from composeformer.errors import PluginError, join
from composeformer.plan import Node
from composeformer.spec import Spec
from composeformer.store.bisecting.change import Change
from composeformer.store.bisecting.relations import Relation, alike, relation
from composeformer.store.outputs import gap

Values = Mapping[str, Tensor]


class Tensors:
    """The tensors of two models that both have and that differ, with the spacing of the dtype they are stored in."""

    def __init__(self, ours: Values, theirs: Values, eps: float) -> None:
        self.ours, self.theirs, self.eps = ours, theirs, eps
        self.names = [name for name in ours if name in theirs and self._differs(name)]

    def _differs(self, name: str) -> bool:
        a, b = self.ours[name], self.theirs[name]
        return a.shape == b.shape and a.is_floating_point() and not torch.equal(a, b.to(a.device))

    def nearer(self, name: str, changed: Tensor) -> Tensor | None:
        """The tensor to try in place of ours: the trusted one, if this is that, or this, if it is far nearer."""
        theirs = self.theirs[name]
        if alike(changed.double(), theirs.double(), self.eps):
            return theirs
        before, after = gap(name, self.ours[name], theirs).relative, gap(name, changed, theirs).relative
        return changed if before is not None and after is not None and after <= before / 2 else None


def proposals(spec: Spec, tensors: Tensors) -> tuple[list[Change], list[str]]:
    """Changes of tensors, those that parts state first; and the tensors that differ and that nothing explains."""
    if not tensors.names:
        return [], []
    found = list(_stated(spec, tensors))
    settled = {n for change in found for n, value in change.tensors.items() if value is tensors.theirs[n]}
    found += _general(spec, tensors, [name for name in tensors.names if name not in settled])
    explained = {name for change in found for name in change.tensors}
    return found, [name for name in tensors.names if name not in explained]


def _stated(spec: Spec, tensors: Tensors) -> Iterator[Change]:
    """The conventions of parts, each for all parts of its slot and kind where it holds."""
    groups: dict[tuple[str, str, str, str], dict[str, Tensor]] = {}
    for node in spec.plan.nodes():
        named = tuple(name for below in node.walk() for name, _ in below.tensors())
        if node.slot == "position" or not any(name in tensors.names for name in named):
            continue
        for convention in conventions(node, spec):
            for change in convention.changes:
                for here, there, values in _undone(change, convention, node.path, tensors):
                    key = (f"{node.slot} {node.part.kind}", convention.name, here, there)
                    groups.setdefault(key, {}).update(values)
    for (part, name, here, there), values in groups.items():
        yield Change(
            source="tensors",
            name=f"{name} of {part}",
            here=here,
            there=there,
            where=tuple(values),
            tensors=values,
        )


def conventions(node: Node, spec: Spec) -> list[Convention]:
    """What a part states of its tensors. Raises PluginError where that fails or names what the part does not have."""
    with blame(spec.registry, node.part, node.path, "conventions"):
        found = list(node.part.config.conventions(node.site))
    start = len(node.path) + 1
    shapes = {name[start:]: w.shape for below in node.walk() for name, w in below.tensors()}
    for each in found:
        for told in wrong(each, shapes):
            raise PluginError(f"{described(spec.registry, node.part, node.path)}: conventions: {told}")
    return found


def _undone(
    change: Restored, convention: Convention, path: str, tensors: Tensors
) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """How it is here, how there, and our tensors with the change undone or made, where that brings them nearer."""
    usual, other = convention.usual, convention.other
    if isinstance(change, Swap):
        names = join(path, change.first), join(path, change.second)
        if all(name in tensors.names for name in names):
            first, second = names
            values = {first: tensors.ours[second], second: tensors.ours[first]}
            nearer = {name: tensors.nearer(name, value) for name, value in values.items()}
            if all(value is not None for value in nearer.values()):
                yield other, usual, {name: value for name, value in nearer.items() if value is not None}
        return
    name = join(path, change.tensor)
    if name not in tensors.names:
        return
    ours = tensors.ours[name]
    if isinstance(change, Shift):
        ways = [(other, usual, ours - change.by), (usual, other, ours + change.by)]
    else:
        back = inverse(change.indices)
        ways = [(other, usual, ordered(ours, change, back))]
        if back != change.indices:
            ways.append((usual, other, ordered(ours, change, change.indices)))
    for here, there, value in ways:
        tried = tensors.nearer(name, value)
        if tried is not None:
            yield here, there, {name: tried}
            return


def ordered(tensor: Tensor, change: Order, indices: tuple[int, ...]) -> Tensor:
    """A tensor with the blocks along the change's dimension in this order."""
    starts = torch.arange(0, tensor.shape[change.dim], len(indices))
    features = (starts[:, None] + torch.tensor(indices)).flatten()
    return tensor.index_select(change.dim, features.to(tensor.device))


def _general(spec: Spec, tensors: Tensors, names: list[str]) -> Iterator[Change]:
    """What relates tensors of any part: two of one part under each other's name, an order, a scale."""
    groups: dict[tuple[str, str, str], tuple[str, dict[str, Tensor]]] = {}
    left = set(names)
    for node in spec.plan.nodes():
        start = len(node.path) + 1
        own = [name for name, _ in node.tensors() if name in left]
        for first, second in combinations(own, 2):
            if tensors.ours[first].shape == tensors.ours[second].shape and _exchanged(first, second, tensors):
                told = f"{first[start:]} and {second[start:]}"
                swapped = {first: tensors.theirs[first], second: tensors.theirs[second]}
                groups.setdefault((f"{node.slot}.{told}", "swap", ""), ("exchanged", {}))[1].update(swapped)
                left -= {first, second}
        for name in own:
            if name not in left:
                continue
            a, b = tensors.ours[name].cpu(), tensors.theirs[name].cpu()
            found = relation(a, b, tensors.eps)
            if found is None:
                continue
            told = found.told + _known(found, node, spec, tensors.eps)
            key = (f"{node.slot}.{name[start:]}", found.sort, "" if found.factor is None else told)
            groups.setdefault(key, (told, {}))[1][name] = tensors.theirs[name]
    for (name, _, _), (told, values) in groups.items():
        yield Change(
            source="tensors", name=name, here=told, there="as it is", where=tuple(values), tensors=values
        )


def _exchanged(first: str, second: str, tensors: Tensors) -> bool:
    return torch.equal(tensors.ours[first], tensors.theirs[second]) and torch.equal(
        tensors.ours[second], tensors.theirs[first]
    )


def _known(found: Relation, node: Node, spec: Spec, eps: float) -> str:
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
    around = [
        each for each in spec.plan.nodes() if node.path == each.path or node.path.startswith(f"{each.path}.")
    ]
    for outer in reversed(around):
        for each in outer.walk():
            yield from _fields(each.part)
    yield "hidden_size", float(spec.model.hidden_size)


def _fields(part: Part) -> Iterator[tuple[str, float]]:
    for name, facts in facts_of(type(part.config)).items():
        value = getattr(part.config, name)
        if facts.affects == "function" and type(value) in (int, float) and value > 0:
            yield f"{part.slot}.{name}", float(value)
