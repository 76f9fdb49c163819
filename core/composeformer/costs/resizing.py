"""A changed architecture that is as large, as slow or as dear as the old one: a fair comparison in one step.

Parts are swapped for those of other tables; then widths, all by one factor and in whole multiples, are chosen so that
the quantity held comes as near to what it was as they allow. It must grow with the widths, as all of these do.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from composeformer.config import facts_of
from composeformer.contracts import SINGLE, SLOTS, SUBLAYERS
from composeformer.costs.counts import cost
from composeformer.costs.pricing import Pricing
from composeformer.errors import ComposeError, InputError, SpecError, nearest, one_of
from composeformer.spec import Spec
from composeformer.spec.document import parse, read

LARGEST_MULTIPLE = 256
WIDEST = 2**24  # features


def _active(spec: Spec) -> float:
    return float(cost(spec).active.without_input_embedding)


def _total(spec: Spec) -> float:
    return float(cost(spec).total)


def _flops(spec: Spec) -> float:
    return cost(spec, context=spec.cost.context).flops_per_token.training


def _cache(spec: Spec) -> float:
    return float(cost(spec, context=spec.cost.context).cache_bytes_at_context)


def _cost(spec: Spec) -> float:
    if spec.cost.tokens is None or spec.cost.gpu_hours is not None or spec.cost.budget is not None:
        raise InputError(
            "--hold cost: needs cost.tokens, and hours that follow from them, not cost.gpu_hours"
        )
    return Pricing(spec).run.rent


HELD: Mapping[str, tuple[Callable[[Spec], float], str]] = {
    "active": (_active, "active parameters, without the input embedding"),
    "total": (_total, "parameters"),
    "flops": (_flops, "training operations of a token"),
    "cache": (_cache, "bytes of cache of a sequence"),
    "cost": (_cost, "rent of the run, USD"),
}


@attrs.frozen(kw_only=True)
class Resized:
    """The new spec. `wanted` is the held quantity of the old one, `found` that of the new; `widths` are the solved
    fields, before and after.
    """

    spec: Spec
    held: str
    told: str
    wanted: float
    found: float
    widths: Mapping[str, tuple[int, int]]

    @property
    def deviation(self) -> float:
        return self.found / self.wanted - 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "held": self.held,
            "definition": self.told,
            "wanted": self.wanted,
            "found": self.found,
            "deviation": self.deviation,
            "widths": {path: {"before": old, "after": new} for path, (old, new) in self.widths.items()},
            "spec": self.spec.to_dict(),
            "fingerprint": self.spec.fingerprint,
        }


def resize(
    spec: Spec,
    *,
    swaps: Mapping[str, Mapping[str, Any]] | None = None,
    hold: str = "active",
    solve: Sequence[str] = (),
    multiple: int | None = None,
    settings: Sequence[str] = (),
) -> Resized:
    """`spec` with parts swapped, its widths solved so that `hold` (a key of `HELD`) stays what it was.

    `swaps` gives tables by slot, whole: `{"mixer": {"kind": ...}}`, with tables of other slots beside that they refer
    to. `solve` are dotted paths of the widths, by default those of every feed-forward part. `multiple` is what they are
    multiples of; by default the largest power of two that divides the old width. `settings` change the new spec, as
    `--set` does. Raises ComposeError where a path is no
    width, where nothing can be solved, or the swapped spec is no model.
    """
    if hold not in HELD:
        near = nearest(hold, HELD)
        hint = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"--hold {hold}: must be one of {one_of(HELD)}{hint}")
    measure, told = HELD[hold]
    wanted = measure(spec)
    swapped = swap(spec, swaps or {}).overridden(settings)
    paths = list(solve) or _widths(swapped)
    if not paths:
        raise InputError(
            "--solve: no feed-forward part has a width; name a field, as in ffn.dense.intermediate_size"
        )
    old = {path: _width(swapped, path) for path in paths}
    steps = {path: multiple or _power_of_two(width) for path, width in old.items()}

    def widths(factor: float) -> dict[str, int]:
        return {
            path: max(1, round(width * factor / steps[path])) * steps[path] for path, width in old.items()
        }

    def sized(chosen: Mapping[str, int]) -> tuple[Spec, float]:
        made = swapped.with_(dict(chosen))
        return made, measure(made)

    chosen = _nearest(lambda factor: sized(widths(factor))[1], wanted, widths, max(old.values()))
    made, found = sized(chosen)
    return Resized(
        spec=made,
        held=hold,
        told=told,
        wanted=wanted,
        found=found,
        widths={path: (old[path], chosen[path]) for path in paths},
    )


def swap(spec: Spec, tables: Mapping[str, Mapping[str, Any]]) -> Spec:
    """`spec` with the parts of these slots replaced. Raises ComposeError for a slot that there is not."""
    data = spec.to_dict()
    for slot, table in tables.items():
        if slot not in SLOTS:
            near = nearest(slot, SLOTS)
            hint = f"; did you mean {near!r}?" if near else ""
            raise InputError(f"--swap {slot}: is no slot; slots: {one_of(SLOTS)}{hint}")
        held = data.get(slot)
        if slot in SUBLAYERS or slot in SINGLE or not isinstance(held, dict):
            data[slot] = dict(table)
        else:
            # What other parts refer to by name stays.
            named = {slot: held} if "kind" in held else held
            given = {slot: table} if "kind" in table else table
            data[slot] = {**named, **given}
        if slot in SUBLAYERS:
            name = slot if "kind" in table else next(iter(table), slot)
            for entry in _entries(data["layers"]):
                if entry.get(slot, True) is not False:
                    entry[slot] = name
    return Spec.from_dict(data, f"{spec.name}, swapped")


def read_swap(text: str) -> dict[str, dict[str, Any]]:
    """`SLOT=FILE.toml`: the tables of a file, by slot. A file that is one table with a `kind` is the slot's.

    Raises ComposeError for a setting that is none, or a file that can not be read.
    """
    slot, equals, ref = text.partition("=")
    if not equals or not ref:
        raise InputError(f"--swap {text}: must be SLOT=FILE.toml, or SLOT={{kind = ...}}")
    if ref.lstrip().startswith("{"):
        table: Any = parse(f"table = {ref}", "--swap").data["table"]
        return {slot: table}
    found: dict[str, Any] = read(Path(ref), ref).data
    if "kind" in found:
        return {slot: found}
    if slot not in found:
        raise InputError(f"--swap {text}: the file has no table {slot}; it has {one_of(found)}")
    # The slot that is swapped is named last, so that what it refers to is there.
    return {
        **{name: each for name, each in found.items() if name != slot and name in SLOTS},
        slot: found[slot],
    }


def _entries(entries: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for entry in entries:
        found += _entries(entry["layers"]) if "layers" in entry else [entry]
    return found


def _widths(spec: Spec) -> list[str]:
    """The paths of all widths of feed-forward parts that have a table of their own."""
    data: Any = spec.document.data.get("ffn", {})
    named = {"": data} if "kind" in data else data
    found = []
    for name, table in named.items():
        facts = facts_of(spec.registry.get("ffn", table["kind"]).config)
        key = f'"{name}"' if name and not name.replace("_", "").replace("-", "").isalnum() else name
        start = "ffn" if not name else f"ffn.{key}"
        found += [
            f"{start}.{field}"
            for field, fact in facts.items()
            if fact.kind == "integer" and fact.unit == "features" and field in table
        ]
    return found


def _width(spec: Spec, path: str) -> int:
    """The integer at a path. Raises InputError where there is none."""
    for steps, value, _ in spec.values():
        if steps == path:
            if type(value) is int and value > 0:
                return value
            raise InputError(f"--solve {path} = {value}: is no width; name an integer field")
    near = nearest(path, [steps for steps, _, _ in spec.values()])
    hint = f"; did you mean {near!r}?" if near else ""
    raise InputError(f"--solve {path}: the spec has no such value{hint}")


def _power_of_two(width: int) -> int:
    return min(width & -width, LARGEST_MULTIPLE)


def _nearest(
    measure: Callable[[float], float],
    wanted: float,
    widths: Callable[[float], Mapping[str, int]],
    widest: int,
) -> Mapping[str, int]:
    """The widths whose measure is nearest to what is wanted, by bisection on their common factor."""
    low, high = 0.0, 1.0
    if measure(high) == measure(2 * high):
        raise InputError("these widths do not change what is held; name others with --solve")
    if measure(low) > wanted:
        raise InputError("even the narrowest widths make more than what is held; change the parts themselves")
    while measure(high) < wanted:
        low, high = high, 2 * high
        if high * widest > WIDEST:
            raise InputError(f"widths of {WIDEST:,} features are not enough to reach what is held")
    seen = {}
    for _ in range(60):
        middle = (low + high) / 2
        chosen = widths(middle)
        if chosen in (widths(low), widths(high)):
            break
        if measure(middle) < wanted:
            low = middle
        else:
            high = middle
    for factor in (low, high):
        try:
            seen[factor] = abs(measure(factor) - wanted)
        except SpecError as error:
            raise ComposeError(*error.lines) from None
    return widths(min(seen, key=lambda factor: seen[factor]))
