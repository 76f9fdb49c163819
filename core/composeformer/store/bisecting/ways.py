"""The ways in which parts state that tensors of theirs may be stored, each as a function that undoes it.

A convention is proposed only where it brings a tensor to the trusted one, or at least twice as near: one that does not
would cost a forward and say nothing. Two conventions of one tensor hide each other, so pairs are looked at where
neither alone is enough, on tensors that have the trusted one's values in another order.
"""

from collections.abc import Callable, Iterator, Mapping
from math import isfinite

import attrs
import torch
from torch import Tensor

from composeformer.blame import blame, described
from composeformer.conventions import Convention, Restored, Shift, Swap, inverse, wrong
from composeformer.errors import PluginError, join
from composeformer.plan import Node
from composeformer.spec import Spec
from composeformer.store.bisecting.relations import alike, sample

Values = Mapping[str, Tensor]


class Tensors:
    """The tensors of two models that both have and that differ, with the spacing of the dtype they are stored in."""

    def __init__(self, ours: Values, theirs: Values, eps: float) -> None:
        self.ours, self.theirs, self.eps = ours, theirs, eps
        self.names = [name for name in ours if name in theirs and self._differs(name)]
        self._ratios: dict[tuple[bool, str], float] = {}
        self._apart: dict[str, float | None] = {}

    def _differs(self, name: str) -> bool:
        a, b = self.ours[name], self.theirs[name]
        return a.shape == b.shape and a.is_floating_point() and not torch.equal(a, b.to(a.device))

    def same(self, name: str, changed: Tensor) -> bool:
        """Whether this is the trusted tensor, to within the rounding of its dtype."""
        theirs = self.theirs[name]
        if changed.shape != theirs.shape or not alike(sample(changed), sample(theirs), self.eps):
            return False
        return alike(changed.double(), theirs.double(), self.eps)

    def nearer(self, name: str, changed: Tensor) -> Tensor | None:
        """The tensor to try in place of ours: the trusted one, if this is that, or this, if it is far nearer."""
        if self.same(name, changed):
            return self.theirs[name]
        theirs = self.theirs[name]
        before = self._before(name)
        # A sample's largest difference is no more than that of the whole.
        if before is None or float((sample(changed) - sample(theirs)).abs().max()) > before / 2:
            return None
        return changed if _apart(changed, theirs) <= before / 2 else None

    def _before(self, name: str) -> float | None:
        """How far our tensor is from the trusted one; None where that is no number."""
        if name not in self._apart:
            found = _apart(self.ours[name], self.theirs[name])
            self._apart[name] = found if isfinite(found) else None
        return self._apart[name]

    def possible(self, name: str, other: str) -> bool:
        """Whether our `other` may have the values of the trusted `name` in another order, and scaled.

        Neither changes the ratio of the fourth powers' sum to the square of the squares' sum; that is cheap to look at.
        Vectors, which may be shifted, are quick to try.
        """
        if self.ours[other].shape != self.theirs[name].shape:
            return False
        if self.ours[other].ndim == 1:
            return True
        ours, theirs = self._ratio(True, other), self._ratio(False, name)
        return abs(ours - theirs) <= 8 * self.eps * theirs

    def _ratio(self, own: bool, name: str) -> float:
        if (own, name) not in self._ratios:
            squares = (self.ours if own else self.theirs)[name].double().square()
            total = float(squares.sum())
            self._ratios[own, name] = float(squares.square().sum()) / total**2 if total else 0.0
        return self._ratios[own, name]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


@attrs.frozen(kw_only=True, eq=False)
class Way:
    """How tensors may be stored here: `about` what, and how it is `here` and `there`, in words; `undo` gives those of
    `names` as they would be in the trusted model, from such as they are here; `redo` leads back.
    """

    about: str
    here: str
    there: str
    names: tuple[str, ...]
    undo: Callable[[Values], dict[str, Tensor]]
    redo: Callable[[Values], dict[str, Tensor]]


def ways(spec: Spec, tensors: Tensors) -> Iterator[Way]:
    """Every way that a part states for tensors that differ, and for each the reverse."""
    differing = set(tensors.names)
    for node in spec.plan.nodes():
        named = (name for below in node.walk() for name, _ in below.tensors())
        if node.slot == "position" or differing.isdisjoint(named):
            continue
        for convention in conventions(node, spec):
            for change in convention.changes:
                found = _ways(change, convention, node)
                yield from (way for way in found if differing.issuperset(way.names))


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


def _ways(change: Restored, convention: Convention, node: Node) -> Iterator[Way]:
    about = f"{convention.name} of {node.slot} {node.part.kind}"
    usual, other = convention.usual, convention.other
    if isinstance(change, Swap):
        first, second = join(node.path, change.first), join(node.path, change.second)

        def swap(values: Values) -> dict[str, Tensor]:
            return {first: values[second], second: values[first]}

        yield Way(about=about, here=other, there=usual, names=(first, second), undo=swap, redo=swap)
        return
    name = join(node.path, change.tensor)
    if isinstance(change, Shift):
        by = change.by
        less, more = _alone(name, lambda tensor: tensor - by), _alone(name, lambda tensor: tensor + by)
        yield Way(about=about, here=other, there=usual, names=(name,), undo=less, redo=more)
        yield Way(about=about, here=usual, there=other, names=(name,), undo=more, redo=less)
        return
    dim, indices, reverse = change.dim, change.indices, inverse(change.indices)
    order = _alone(name, lambda tensor: ordered(tensor, dim, indices))
    back = _alone(name, lambda tensor: ordered(tensor, dim, reverse))
    yield Way(about=about, here=other, there=usual, names=(name,), undo=back, redo=order)
    if indices != reverse:
        yield Way(about=about, here=usual, there=other, names=(name,), undo=order, redo=back)


def _alone(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Values], dict[str, Tensor]]:
    return lambda values: {name: change(values[name])}


def ordered(tensor: Tensor, dim: int, indices: tuple[int, ...]) -> Tensor:
    """A tensor with the blocks along a dimension in this order."""
    starts = torch.arange(0, tensor.shape[dim], len(indices))
    features = (starts[:, None] + torch.tensor(indices)).flatten()
    return tensor.index_select(dim, features.to(tensor.device))


def pairs(name: str, known: Mapping[str, list[Way]], tensors: Tensors) -> tuple[Way, Way] | None:
    """Two ways that together make this tensor the trusted one, in the order in which they are undone."""
    for last in known.get(name, ()):
        for first in {id(way): way for source in last.names for way in known.get(source, ())}.values():
            sources = {*first.names, *last.names}
            if first is last or not any(tensors.possible(name, source) for source in sources):
                continue
            state = {each: tensors.ours[each] for each in sources}
            if tensors.same(name, last.undo(state | first.undo(state))[name]):
                return first, last
    return None
