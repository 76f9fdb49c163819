"""Conventions that no spec can tell: other ways to store the same tensors, as other code bases do.

A rotary pair may stand side by side or half a head apart, a norm's weight may be kept less one, two halves of an
input may come in either order: tensors of the right names and shapes, and another function. A part knows which of
these are in use for its own tensors, and says so in `Config.conventions(site)`, without torch, as it says what tensors
it has. `compose verify --bisect` tries them where tensors differ from those of a trusted model.

```python
def conventions(self, site):
    turned = interleaved(self.head_dim)
    orders = tuple(Order(tensor=f"{name}.weight", dim=-2, indices=turned) for name in ("q", "k"))
    yield Convention(name="rotary features", usual="in halves", other="in pairs", changes=orders)
```
"""

from collections.abc import Iterable, Mapping, Sequence

import attrs


@attrs.frozen(kw_only=True)
class Order:
    """Features in another order: in each block of `len(indices)` along `dim`, the other order's i-th is the usual
    one's `indices[i]`.

    `tensor` is the name below the part (`q.weight`, or a child's: `q_norm.weight`). `dim` counts from the end, so
    that stacks of groups are told alike: -1 are a weight's inputs or a vector's features, -2 a weight's outputs.
    """

    tensor: str
    dim: int
    indices: tuple[int, ...]


@attrs.frozen(kw_only=True)
class Swap:
    """Two tensors of one shape, each under the other's name."""

    first: str
    second: str


@attrs.frozen(kw_only=True)
class Shift:
    """A tensor that is stored with `by` added."""

    tensor: str
    by: float


Restored = Order | Swap | Shift


@attrs.frozen(kw_only=True)
class Convention:
    """One other way to store a part's tensors: what it is about, the way its module reads, the other way, in words.

    `changes` lead from the usual way to the other one; each may be true of a model without the rest.
    """

    name: str
    usual: str
    other: str
    changes: tuple[Restored, ...]


def transposed(rows: int, columns: int) -> tuple[int, ...]:
    """The order (columns, rows) of features that stand as (rows, columns): `transposed(2, 2)` is 0, 2, 1, 3."""
    return tuple(row * columns + column for column in range(columns) for row in range(rows))


def interleaved(width: int) -> tuple[int, ...]:
    """The order in pairs of features that stand in halves."""
    return transposed(2, width // 2)


def exchanged(first: int, second: int) -> tuple[int, ...]:
    """The order in which the first features of a block stand behind the `second` ones that follow them."""
    return (*range(first, first + second), *range(first))


def after(count: int, indices: Sequence[int]) -> tuple[int, ...]:
    """An order of features that have `count` others before them, which stay."""
    return (*range(count), *(count + index for index in indices))


def widened(indices: Sequence[int], width: int) -> tuple[int, ...]:
    """An order of blocks (heads) of `width` features, as an order of features."""
    return tuple(index * width + feature for index in indices for feature in range(width))


def gathered(blocks: int, first: int, second: int) -> tuple[int, ...]:
    """The order in which the `first` features of every block come before the `second` ones of any."""
    width = first + second
    starts = range(0, blocks * width, width)
    leading = (start + feature for start in starts for feature in range(first))
    trailing = (start + first + feature for start in starts for feature in range(second))
    return (*leading, *trailing)


def inverse(indices: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes this one."""
    found = [0] * len(indices)
    for place, index in enumerate(indices):
        found[index] = place
    return tuple(found)


def wrong(found: object, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    """What is wrong with a stated convention of a part whose tensors have these shapes, in words."""
    if not isinstance(found, Convention):
        yield f"is a {type(found).__name__}, not a Convention"
        return
    for change in found.changes:
        names = (change.first, change.second) if isinstance(change, Swap) else (change.tensor,)
        for name in names:
            if name not in shapes:
                yield f"{found.name}: names a tensor {name}, which is not declared"
        if any(name not in shapes for name in names):
            continue
        shape = shapes[names[0]]
        if isinstance(change, Swap) and shape != shapes[change.second]:
            yield f"{found.name}: {change.first} has shape {shape}, {change.second} {shapes[change.second]}"
        if isinstance(change, Order):
            if change.dim not in (-1, -2) or len(shape) < -change.dim:
                yield f"{found.name}: dim = {change.dim} of {change.tensor}, whose shape is {shape}"
            elif not change.indices or sorted(change.indices) != list(range(len(change.indices))):
                yield f"{found.name}: the indices for {change.tensor} are no order of 0 to {len(change.indices) - 1}"
            elif shape[change.dim] % len(change.indices):
                told = f"blocks of {len(change.indices)} do not divide the {shape[change.dim]}"
                yield f"{found.name}: {told} of {change.tensor}"
