"""A spec read backwards: the values of every name in it, and the foreign config that gives them.

Layers that share a line must agree. What the lines can not see is caught by reading the config again and
comparing what the two specs mean.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from composeformer.config import facts_of
from composeformer.contracts import Part
from composeformer.dialects import patterns
from composeformer.dialects.expressions import Expression
from composeformer.dialects.family import Family
from composeformer.dialects.lines import LAYER_SLOTS, UNSET, Fixed, Key
from composeformer.dialects.reading import Values
from composeformer.errors import DialectError, show
from composeformer.plan import Node

if TYPE_CHECKING:
    from composeformer.spec import Spec


class _Nowhere:
    """What a path leads to where the spec has no such part or field."""


NOWHERE = _Nowhere()


def values(family: Family, spec: "Spec") -> Values:
    """The values that a spec gives. Raises DialectError with every reason why it is not of this family."""
    made = Values(names=dict.fromkeys(family.names))
    made.names["num_layers"] = len(spec.layers)
    for pattern in family.patterns:
        made.chosen[pattern.name] = tuple(
            found not in (None, NOWHERE) if pattern.equals is UNSET else found == pattern.equals
            for _, found in _found(spec, pattern.ours, range(len(spec.layers)))
        )
    reasons: list[str] = []
    kinds = [fixed for fixed in family.fixed if fixed.ours.endswith(".kind")]
    for group in (kinds, [fixed for fixed in family.fixed if fixed not in kinds]):
        for fixed in group:
            reasons += _unlike(family, made, spec, fixed)
        if reasons:
            raise DialectError(*reasons)
    for key in family.keys:
        if key.name is not None and key.ours:
            try:
                value = _value(family, made, spec, key)
                if value is UNSET:
                    continue
                if key.values is not None and value not in key.values.values():
                    # Other lines hang on this one.
                    raise DialectError(f"{key.ours[0]} = {show(value)}: {key.theirs} has no word for it")
                made.names[key.name] = value
            except DialectError as error:
                reasons.extend(error.lines)
                if key.values is not None:
                    break
    if not reasons:
        for key in family.keys:
            if key.name is not None and key.choices:
                made.names[key.name] = next((c.value for c in key.choices if made.holds(c.when)), None)
        reasons += made.refused(family)
    if reasons:
        raise DialectError(*reasons)
    return made


def config(family: Family, made: Values) -> dict[str, Any]:
    """Their keys for these values; nested ones as `table.key`."""
    written: dict[str, Any] = {}
    reasons: list[str] = []
    for key in family.keys:
        if key.shape is not None or key.write == "never" or key.refuse is not None:
            continue
        if not (made.layers(key.when) if family.by_layer(key) else made.holds(key.when)):
            if key.null == "absent" and family.by_layer(key):
                written[key.theirs] = None
            continue
        try:
            value = foreign(key, made)
        except DialectError as error:
            reasons.extend(error.lines)
            continue
        if value is not UNSET:
            written[key.theirs] = value
    for pattern in family.patterns:
        try:
            written.update(patterns.write(pattern, made.chosen[pattern.name]))
        except DialectError as error:
            reasons.extend(error.lines)
    if reasons:
        raise DialectError(*reasons)
    return written


def foreign(key: Key, made: Values) -> object:
    """The value that a key has, UNSET where it is better left out."""
    if not key.ours:
        return made.names[str(key.name)] if key.choices else _evaluated(key.require, made)
    value = made.names[str(key.name)]
    if value is None:
        if key.absent is not UNSET:
            return key.absent
        if key.null != "absent":
            raise DialectError(f"{key.ours[0]} has no value, and {key.theirs} needs one")
        return UNSET if key.default is UNSET else None
    if key.values is not None:
        value = next(theirs for theirs, ours in key.values.items() if ours == value)
    if key.write == "changed" and key.default is not UNSET and _evaluated(key.default, made) == value:
        return UNSET
    return value


def _evaluated(found: object, made: Values) -> object:
    return found.value(made.names) if isinstance(found, Expression) else found


def _unlike(family: Family, made: Values, spec: "Spec", fixed: Fixed) -> list[str]:
    """Where a spec differs from what the family fixes."""
    for place, found in _places(family, made, spec, fixed.ours, fixed):
        if found != fixed.value:
            what = "there is none" if found is NOWHERE or found is None else show(found)
            return [f"{place} must be {show(fixed.value)} in {family.name}, but {what}"]
    return []


def _value(family: Family, made: Values, spec: "Spec", key: Key) -> object:
    """The one value of all paths of a line, UNSET where the line does not hold."""
    if not family.by_layer(key) and not made.holds(key.when):
        return UNSET
    first: tuple[str, object] | None = None
    for path in key.ours:
        for place, found in _places(family, made, spec, path, key):
            if found is NOWHERE:
                raise DialectError(f"{place}: {family.name} needs this, and the spec has no such thing")
            if first is None:
                first = (place, found)
            elif found != first[1]:
                both = f"{first[0]} = {show(first[1])} and {place} = {show(found)}"
                raise DialectError(f"{both}: {family.name} has one {key.theirs} for both")
    return UNSET if first is None else first[1]


def _places(
    family: Family, made: Values, spec: "Spec", path: str, line: Key | Fixed
) -> Iterator[tuple[str, object]]:
    if not family.by_layer(line):
        return _found(spec, path, range(len(spec.layers)) if made.holds(line.when) else ())
    return _found(spec, path, made.layers(line.when))


def _found(spec: "Spec", path: str, layers: Any) -> Iterator[tuple[str, object]]:
    """What a path leads to, with where: once at a model's ends, once for each of the layers."""
    slot, *steps = path.split(".")
    if path == "num_layers":
        yield path, len(spec.layers)
    elif slot == "model":
        yield path, getattr(spec.model, steps[0], NOWHERE)
    elif slot in LAYER_SLOTS:
        for layer in layers:
            yield f"layers.{layer}.{path}", _follow(spec.plan.layers[layer].get(slot), steps)
    elif layers and not (slot == "predictor" and spec.plan.predictor is None):
        yield path, _follow(getattr(spec.plan, slot), steps)


def _follow(node: Node | None, steps: list[str]) -> object:
    if node is None:
        return NOWHERE
    part, below = node.part, node.children
    for step in steps[:-1]:
        held = getattr(part.config, step, None)
        if not isinstance(held, Part):
            return NOWHERE
        # As it was built, so that defaults of its site count.
        child = next((n for n in below.values() if n.stated is held), None)
        part, below = (held, {}) if child is None else (child.part, child.children)
    if steps[-1] == "kind":
        return part.kind
    if steps[-1] not in facts_of(type(part.config)):
        return NOWHERE
    return getattr(part.config, steps[-1])
