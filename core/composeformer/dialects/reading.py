"""A foreign config read: the value of every name, and our paths filled. All that is wrong is gathered."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from composeformer.dialects import patterns
from composeformer.dialects.expressions import Expression
from composeformer.dialects.factors import Factors
from composeformer.dialects.family import Family
from composeformer.dialects.lines import LAYER_SLOTS, UNSET, Key
from composeformer.errors import DialectError, nearest, one_of, show

MAX_LAYERS = 10_000
Tree = dict[str, Any]
Numbers = Callable[[str], Sequence[float]]

log = logging.getLogger(__name__)


@attrs.define
class Values:
    """What a model's config says: names (None where a line does not hold), and each pattern's layers."""

    names: dict[str, Any] = attrs.field(factory=dict)
    chosen: dict[str, tuple[bool, ...]] = attrs.field(factory=dict)
    read_off: dict[str, Any] = attrs.field(factory=dict)  # our paths that no key fills

    @property
    def num_layers(self) -> int:
        return int(self.names["num_layers"])

    def at(self, layer: int) -> dict[str, Any]:
        """Names for expressions in one layer."""
        return {**self.names, "l": layer, **{name: layers[layer] for name, layers in self.chosen.items()}}

    def holds(self, when: Expression | None, layer: int | None = None) -> bool:
        return when is None or bool(when.value(self.names if layer is None else self.at(layer)))

    def layers(self, when: Expression | None) -> list[int]:
        """The layers in which a line holds."""
        return [layer for layer in range(self.num_layers) if self.holds(when, layer)]

    def refused(self, family: Family) -> list[str]:
        """Why the family has no such model."""
        reasons = []
        for each in family.refusals:
            names = self.names if each.layer is None else self.at(each.layer.integer(self.names))
            if each.when.value(names):
                reasons.append(each.why)
        return reasons


def read(
    family: Family,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    get: Numbers | None = None,
) -> Values:
    """The values that a config gives. Raises DialectError with all that is wrong, unknown keys first."""
    problems: list[str] = []
    config = _one_name(family, config, problems)
    known = {key.theirs for key in family.keys if key.shape is None} | family.ignore
    known |= {key for pattern in family.patterns for key in pattern.keys}
    families = tuple(name[:-1] for name in family.ignore if name.endswith("*"))
    for name, found in config.items():
        if name not in known and not (families and name.startswith(families)):
            refusal = f"{family.name} does not know this field, and it could change the model"
            problems.append(f"{name} = {show(found)}: {refusal}{hint(name, known)}")
    values = Values(names=dict.fromkeys(family.names))
    late = []
    for key in family.keys:
        if family.by_layer(key):
            late.append(key)
        else:
            take(key, config, shapes, values, problems)
    count = values.names["num_layers"]
    if type(count) is not int or not 1 <= count <= MAX_LAYERS:
        owner = next(key.theirs for key in family.keys if key.name == "num_layers")
        problems.append(f"{owner} = {show(count)}: must be an integer between 1 and {MAX_LAYERS}")
        raise DialectError(*dict.fromkeys(problems))
    for pattern in family.patterns:
        try:
            values.chosen[pattern.name] = patterns.read(pattern, config, count)
        except DialectError as error:
            problems.extend(error.lines)
    if not problems:
        for key in late:
            # Where no layer has it, it says nothing.
            if values.layers(key.when):
                take(attrs.evolve(key, when=None), config, shapes, values, problems)
    if not problems and shapes:
        _check_stored(family, shapes, values)
    if not problems:
        problems += values.refused(family)
    for factors in family.factors:
        if factors.theirs in shapes and not problems:
            try:
                values.read_off |= _factors(factors, family, config, values, get)
            except DialectError as error:
                problems.extend(error.lines)
    if problems:
        raise DialectError(*dict.fromkeys(problems))
    return values


def _one_name(family: Family, config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The config with each key under its first name."""
    made = dict(config)
    for key in family.keys:
        for other in key.also:
            if other in made:
                found = made.pop(other)
                if made.setdefault(key.theirs, found) != found:
                    both = f"{key.theirs} = {show(made[key.theirs])} and {other} = {show(found)}"
                    problems.append(f"{both}: which is meant?")
    return made


def _check_stored(family: Family, shapes: Mapping[str, tuple[int, ...]], values: Values) -> None:
    """Makes absent what is announced but not stored, in a logged line."""
    for key in family.keys:
        if key.stored is None or key.name is None or values.names[key.name] is None:
            continue
        start = key.stored.fill(values.names)
        if not any(name.startswith(start) for name in shapes):
            told = f"{key.theirs} = {show(values.names[key.name])}, but nothing of {start} is stored"
            log.warning("%s: read as %s", told, show(key.absent))
            values.names[key.name] = None


def _factors(
    factors: Factors, family: Family, config: Mapping[str, Any], values: Values, get: Numbers | None
) -> dict[str, object]:
    theta = values.names.get("theta")
    if get is None or not isinstance(theta, int | float):
        raise DialectError(f"{factors.theirs}: its numbers are needed, and can not be read here")
    for key in family.keys:
        stated = config.get(key.theirs)
        if f"{factors.ours}.kind" in key.ours and stated not in (None, key.default):
            raise DialectError(f"{factors.theirs} and {key.theirs} = {show(stated)}: which is meant?")
    return factors.fields(get(factors.theirs), theta)


def hint(name: str, known: Iterable[str]) -> str:
    """The key that was meant, among those of the same table."""
    table, dot, key = name.rpartition(".")
    beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == table]
    near = nearest(key, beside)
    return f"; did you mean {table + dot + near!r}?" if near else ""


def take(
    key: Key,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    values: Values,
    problems: list[str],
) -> None:
    """One line's value into `values`, or a problem."""
    try:
        if not values.holds(key.when):
            found = config.get(key.theirs)
            if found is not None and key.when is not None:
                problems.append(f"{key.theirs} = {show(found)}: has a meaning only when {key.when.text}")
            return
        if key.refuse is not None:
            if (found := config.get(key.theirs)) is not None:
                problems.append(f"{key.theirs} = {show(found)}: {key.refuse}")
            return
        value = _shape(key, shapes) if key.shape is not None else _value(key, config, values)
        if key.require is not UNSET:
            required = _evaluated(key.require, values)
            if not _same(value, required):
                problems.append(f"{key.theirs} = {show(value)}: must be {show(required)}")
        if key.name is not None:
            values.names[key.name] = value
    except DialectError as error:
        problems.extend(
            line if line.startswith(key.theirs) else f"{key.theirs}: {line}" for line in error.lines
        )


def _value(key: Key, config: Mapping[str, Any], values: Values) -> Any:
    found = config.get(key.theirs, UNSET)
    if found is None and key.null == "absent":
        return None
    if found is None and isinstance(key.null, Expression):
        return key.null.value(values.names)
    if found is UNSET or (found is None and key.null == "default"):
        if key.default is UNSET:
            if key.null == "absent":
                return None
            if key.require is not UNSET:
                return _evaluated(key.require, values)
            raise DialectError(f"{key.theirs} is required")
        found = _evaluated(key.default, values)
        if isinstance(key.default, Expression):
            return found
    if found is None:
        raise DialectError(f"{key.theirs} = null: must have a value")
    if key.absent is not UNSET and _same(found, key.absent):
        return None
    if key.choices and not any(_same(found, each.value) for each in key.choices):
        allowed = one_of(show(each.value) for each in key.choices)
        raise DialectError(f"{key.theirs} = {show(found)}: must be one of {allowed}")
    if key.values is not None:
        if type(found) not in (str, bool) or found not in key.values:
            allowed = one_of(word if isinstance(word, str) else show(word) for word in key.values)
            raise DialectError(f"{key.theirs} = {show(found)}: must be one of {allowed}")
        return key.values[found]
    return found


def _shape(key: Key, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    found = shapes.get(key.theirs)
    if key.shape == "exists":
        return found is not None
    if key.shape == "missing":
        return found is None
    if found is None or not isinstance(key.shape, int) or key.shape >= len(found):
        raise DialectError(f"{key.theirs}: the tensor is missing, or has too few dimensions")
    return found[key.shape]


def _evaluated(found: object, values: Values) -> Any:
    return found.value(values.names) if isinstance(found, Expression) else found


def _same(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def tree(family: Family, values: Values) -> Tree:
    """Our paths filled: `model`, the ends, and under `layers` one table of parts for each layer."""
    made: Tree = {"layers": [{} for _ in range(values.num_layers)]}
    for fixed in family.fixed:
        _fill(made, values, fixed.ours, fixed.value, fixed.when, family.by_layer(fixed))
    for key in family.keys:
        value = values.names.get(key.name) if key.name is not None else None
        if value is None:
            continue
        for path in key.ours:
            _fill(made, values, path, value, key.when, family.by_layer(key))
    for path, value in values.read_off.items():
        _fill(made, values, path, value, None, False)
    if "kind" not in made.get("predictor", {}):
        made.pop("predictor", None)
    return made


def _fill(made: Tree, values: Values, path: str, value: Any, when: Expression | None, by_layer: bool) -> None:
    if path == "num_layers" or not (by_layer or values.holds(when)):
        return
    if path.partition(".")[0] in LAYER_SLOTS:
        for layer in values.layers(when) if by_layer else range(values.num_layers):
            _set(made["layers"][layer], path, value)
    else:
        _set(made, path, value)


def _set(table: Tree, path: str, value: Any) -> None:
    *steps, last = path.split(".")
    for step in steps:
        table = table.setdefault(step, {})
    table[last] = value
