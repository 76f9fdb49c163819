"""Tensor lines expanded for one model: which tensors of theirs hold which of ours, and how they are laid out.

A `Transfer` is invertible, so the same one reads and writes. Shapes of ours are the plan's; shapes of theirs
follow from them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Literal

import attrs

from composeformer.dialects.expressions import Template
from composeformer.dialects.family import Family
from composeformer.dialects.lines import TensorLine
from composeformer.dialects.reading import Values
from composeformer.errors import DialectError, one_of, show

if TYPE_CHECKING:
    from composeformer.spec import Spec

Shape = tuple[int, ...]
CUT = 20
# Ten times what the largest released models are stored in.
MAX_TENSORS = 1_000_000


@attrs.frozen(kw_only=True)
class Side:
    """Tensors of one side, joined into one: `parts` along `axis`, each a tensor or a stack of them."""

    parts: tuple[tuple[str, ...], ...]
    shapes: tuple[Shape, ...]  # of each part, its stack included
    stacked: bool
    axis: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(chain.from_iterable(self.parts))

    @property
    def count(self) -> int:
        """Of the names."""
        return sum(map(len, self.parts))

    def tensor_shapes(self) -> dict[str, Shape]:
        """The shape of each tensor by name."""
        drop = 1 if self.stacked else 0
        return {
            name: shape[drop:] for part, shape in zip(self.parts, self.shapes, strict=True) for name in part
        }

    def groups(self, start: int, stop: int) -> "Side":
        """The same of groups [start, stop) alone, dimension 0 of the joined tensor, which is not what joins it."""
        return attrs.evolve(
            self,
            parts=tuple(part[start:stop] if self.stacked else part for part in self.parts),
            shapes=tuple((stop - start, *shape[1:]) for shape in self.shapes),
        )

    def joined(self) -> Shape:
        first = list(self.shapes[0])
        first[self.axis] = sum(shape[self.axis] for shape in self.shapes)
        return tuple(first)


@attrs.frozen(kw_only=True)
class Transfer:
    """Some tensors of theirs, and what they are on our side.

    `move`: reading joins theirs, reshapes to `view`, permutes, reshapes to ours joined. `same`: theirs equal
    the tensor `same_as`, and are written only if `copy`. `drop`: theirs are not read, for the `reason` given.
    `dtype` is what they must have where they hold codes, or what belongs to codes.
    """

    kind: Literal["move", "same", "drop"]
    theirs: Side
    ours: Side | None = None
    view: Shape | None = None
    permute: tuple[int, ...] | None = None
    same_as: str | None = None
    copy: bool = False
    reason: str = ""
    dtype: str | None = None

    @property
    def reorders(self) -> bool:
        """Whether elements change their order."""
        return self.view is not None or self.permute is not None

    @property
    def by_groups(self) -> bool:
        """Whether the groups of a stack, dimension 0 on both sides, can be read and written one by one."""
        sides = (self.theirs,) if self.ours is None else (self.theirs, self.ours)
        apart = all(len(side.joined()) > 2 and (side.axis != 0 or len(side.parts) == 1) for side in sides)
        return apart and not self.reorders and len({side.joined() for side in sides}) == 1


def expand(family: Family, spec: "Spec", values: Values) -> list[Transfer]:
    """Every transfer of a model, in the order of the file and then of layers.

    Raises DialectError where a tensor of ours has no line or two, or there are too many.
    """
    plan = {name: weight.shape for name, weight in spec.plan.tensors.items()}
    transfers: list[Transfer] = []
    total = 0
    for line in family.tensors:
        for each in _expand(line, values, plan):
            total += each.theirs.count
            if total > MAX_TENSORS:
                raise DialectError(_too_many(family.name))
            transfers.append(each)
    made = _counted(t.ours for t in transfers if t.ours is not None)
    theirs = _counted(t.theirs for t in transfers if t.kind == "move")
    problems = [f"{name}: {family.name} has no tensor for it" for name in plan if name not in made]
    problems += [f"{name}: two lines fill it" for name, count in made.items() if count > 1]
    problems += [f"{name}: two lines read it" for name, count in theirs.items() if count > 1]
    if problems:
        raise DialectError(*cut(problems))
    return transfers


def _counted(sides: Iterable[Side]) -> Counter[str]:
    """How often each name is in these: of large models there are tens of thousands."""
    return Counter(chain.from_iterable(part for side in sides for part in side.parts))


def _too_many(where: str) -> str:
    return f"{where}: more than {MAX_TENSORS} tensors"


def cut(problems: list[str]) -> list[str]:
    """The first twenty, and how many there are."""
    if len(problems) <= CUT:
        return problems
    return [*problems[:CUT], f"... and {len(problems) - CUT} more, {len(problems)} in all"]


def _expand(line: TensorLine, values: Values, plan: Mapping[str, Shape]) -> Iterator[Transfer]:
    if not line.names & {"l", *values.chosen}:
        if values.holds(line.when):
            yield _transfer(line, values.names, plan)
        return
    if line.each is not None and line.each.value(values.names) is None:
        return
    count = values.num_layers if line.each is None else line.each.integer(values.names)
    for index in range(count):
        here = values.at(index) if line.each is None else {**values.names, "l": index}
        if line.when is None or line.when.value(here):
            yield _transfer(line, here, plan)


def _transfer(line: TensorLine, names: Mapping[str, object], plan: Mapping[str, Shape]) -> Transfer:
    if not line.ours:
        listed = [name for template in line.theirs for name in _indexed(template, line, names)[0]]
        parts = tuple((name,) for name in listed)
        side = Side(parts=parts, shapes=((),) * len(listed), stacked=False, axis=0)
        if line.drop is not None:
            return Transfer(kind="drop", theirs=side, reason=line.drop)
        assert line.same_as is not None
        return Transfer(kind="same", theirs=side, same_as=line.same_as.fill(names), copy=line.copy)
    ours = _ours(line, names, plan)
    joined = ours.joined()
    view = None if line.view is None else tuple(size.integer(names) for size in line.view)
    shape = joined if line.shape is None else tuple(size.integer(names) for size in line.shape)
    if prod(shape) != prod(joined) or (view is not None and prod(view) != prod(joined)):
        sizes = " and ".join(map(show, (shape, view) if view is not None else (shape,)))
        raise DialectError(f"{line.label}: {sizes} do not hold what {one_of(ours.names)} holds, {joined}")
    if line.permute is not None and len(line.permute) != len(view or shape):
        raise DialectError(
            f"{line.label}: permute orders {len(line.permute)} of {len(view or shape)} dimensions"
        )
    theirs = _theirs(line, names, shape)
    return Transfer(kind="move", theirs=theirs, ours=ours, view=view, permute=line.permute)


def _indexed(
    template: Template, line: TensorLine, names: Mapping[str, object]
) -> tuple[tuple[str, ...], bool]:
    """The names that a template stands for: one, or one for each index of its stack."""
    if line.stack is None or line.stack[0] not in template.names:
        return (template.fill(names),), False
    index, size = line.stack[0], line.stack[1].integer(names)
    if size > MAX_TENSORS:
        raise DialectError(_too_many(line.label))
    return template.series(index, size, names), True


def _ours(line: TensorLine, names: Mapping[str, object], plan: Mapping[str, Shape]) -> Side:
    found = [_indexed(template, line, names) for template in line.ours]
    shapes = []
    for part, stacked in found:
        if missing := [name for name in part if name not in plan]:
            raise DialectError(f"{line.label}: this model has no tensor {missing[0]}")
        shapes.append(((len(part),) if stacked else ()) + plan[part[0]])
    return _side(line, found, shapes)


def _theirs(line: TensorLine, names: Mapping[str, object], joined: Shape) -> Side:
    found = [_indexed(template, line, names) for template in line.theirs]
    count = len(found)
    if count == 1:
        return _side(line, found, [joined])
    whole = joined[line.split]
    if line.sizes is not None:
        sizes = [size.integer(names) for size in line.sizes]
    else:
        sizes = [whole // count] * count
    if sum(sizes) != whole or len(sizes) != count:
        raise DialectError(f"{line.label}: parts {show(sizes)} of dimension {line.split} do not make {whole}")
    axis = line.split % len(joined)
    return _side(line, found, [(*joined[:axis], size, *joined[axis + 1 :]) for size in sizes])


def _side(line: TensorLine, found: list[tuple[tuple[str, ...], bool]], shapes: list[Shape]) -> Side:
    stacked = {each for _, each in found}
    if len(stacked) > 1:
        raise DialectError(f"{line.label}: some names have the index of the stack and some have not")
    axis = line.split % max(len(shapes[0]), 1) if len(found) > 1 else 0
    rest = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    if len(rest) > 1:
        raise DialectError(f"{line.label}: parts of shapes {show(shapes)} do not join along dimension {axis}")
    parts = tuple(part for part, _ in found)
    return Side(parts=parts, shapes=tuple(shapes), stacked=stacked.pop(), axis=axis)
