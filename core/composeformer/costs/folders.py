"""What a model's folder holds: elements, dtypes and bytes, counted from the spec without torch.

Tensors are those that a dialect would write under the spec's precision: codes and their scales each counted, and
copies of shared tensors where the family stores them again. A model that no dialect can say is counted under its own
names, each shared tensor once. Bytes are the tensors' own, without file headers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod

import attrs

from composeformer.config import facts_of
from composeformer.dialects import Transfer, expressing
from composeformer.errors import ComposeError, DialectError
from composeformer.formats import BITS
from composeformer.spec import Spec


@attrs.frozen(kw_only=True)
class Checkpoint:
    """The tensors of a folder. `dialect` names them, `native` for the spec's own names; `by_dtype` counts elements, and
    `copies` those of shared tensors that are stored again.
    """

    dialect: str
    tensors: int
    elements: int
    bytes: int
    copies: int
    by_dtype: Mapping[str, int]

    def to_dict(self) -> dict[str, object]:
        """Plain data for `--json`."""
        return {**attrs.asdict(self), "by_dtype": dict(self.by_dtype)}


def checkpoint(spec: "Spec | str") -> Checkpoint:
    """The folder of a spec, its path or its shipped name. Raises ComposeError for a spec that is none."""
    spec = Spec.load(spec)
    try:
        dialect, _ = expressing(spec)
    except DialectError:
        return _counted(
            "native", ((weight.dtype, weight.elements, 1, False) for weight in spec.formats.stored.values())
        )
    return _counted(dialect.name, _written(dialect.rules(spec), spec))


def by_precision(spec: Spec) -> dict[str, Checkpoint | ComposeError]:
    """The folder under every precision that there is, by its kind and what of its fields makes another; or why a
    precision can not be this model's. Those that need a field stated are left out.
    """
    found: dict[str, Checkpoint | ComposeError] = {}
    for kind in spec.registry.kinds("precision"):
        facts = facts_of(spec.registry.get("precision", kind).config).values()
        if any(fact.required for fact in facts):
            continue
        fields = [{}, *({f.name: each} for f in facts for each in f.choices or () if each != f.default)]
        seen: list[Mapping[str, int]] = []
        for changed in fields:
            name = ", ".join([kind, *(f"{field} = {value}" for field, value in changed.items())])
            try:
                made = checkpoint(spec.with_(precision={"kind": kind, **changed}))
            except ComposeError as error:
                found[name] = error
                continue
            if made.by_dtype not in seen:
                seen.append(made.by_dtype)
                found[name] = made
    return found


def _written(transfers: list[Transfer], spec: Spec) -> Iterator[tuple[str | None, int, int, bool]]:
    """The dtype, elements and number of the tensors that each transfer writes, and whether they are copies."""
    stored = spec.formats.stored
    copies = [each for each in transfers if each.copy and each.same_as is not None]
    shared = {each.same_as for each in copies}
    moved: dict[str | None, tuple[str | None, int]] = {}
    for each in transfers:
        if each.ours is not None:
            dtype = stored[each.ours.names[0]].dtype
            count = each.theirs.count
            yield dtype, sum(map(prod, each.theirs.shapes)), count, False
            if count == 1 and each.theirs.names[0] in shared:
                moved[each.theirs.names[0]] = dtype, prod(each.theirs.shapes[0])
    for each in copies:
        dtype, elements = moved[each.same_as]
        count = each.theirs.count
        yield dtype, elements * count, count, True


def _counted(dialect: str, groups: Iterator[tuple[str | None, int, int, bool]]) -> Checkpoint:
    elements: Counter[str] = Counter()
    tensors = copies = 0
    for dtype, size, count, again in groups:
        elements[str(dtype)] += size
        tensors += count
        copies += size if again else 0
    return Checkpoint(
        dialect=dialect,
        tensors=tensors,
        elements=elements.total(),
        bytes=sum(size * BITS[dtype] // 8 for dtype, size in elements.items()),
        copies=copies,
        by_dtype=dict(sorted(elements.items())),
    )
