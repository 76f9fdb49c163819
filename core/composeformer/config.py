"""Configs: frozen, keyword-only attrs classes whose fields carry their own limits, units and help.

A component states each fact of its table once, in `field(...)`. One walker, `check`, reads TOML data
against the fields and reports every problem; the JSON Schema and the generated reference read the same
facts. Nothing is coerced, but for an integer given where a float is asked.

```python
@config
class SwiGLU(Config):
    intermediate_size: int = field(minimum=1, unit="features", help="Width of the gate.")
    norm: Part = part("norm", help="Normalises the input.")
```
"""

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, dataclass_transform

import attrs

from composeformer.errors import Problem, nearest, one_of

if TYPE_CHECKING:
    from composeformer.contracts import Cost, Declared, Phase
    from composeformer.conventions import Convention
    from composeformer.site import Site

T = TypeVar("T")
Affects = Literal["function", "training", "execution"]
Kind = Literal["integer", "float", "boolean", "string"]

# Wider than any model dimension, small enough that products of three stay exact in 128 bits.
LARGEST_INTEGER = 2**40

_SCALARS: dict[Any, Kind] = {int: "integer", float: "float", bool: "boolean", str: "string"}
_WORDS: dict[Kind, str] = {
    "integer": "an integer",
    "float": "a number",
    "boolean": "true or false",
    "string": "a string",
}
_METADATA = "composeformer"

# What stands in place of a slot for a field that takes the parts of a layer.
LAYER = "layer"


@attrs.frozen
class FieldFacts:
    """What one field accepts and means; the single source for checks, schema and documentation."""

    name: str
    kind: Kind | None  # of the value, or of each element of a list; None for a part or a record
    many: bool
    optional: bool
    required: bool
    default: object
    minimum: float | None
    maximum: float | None
    above: float | None
    multiple_of: int | None
    choices: tuple[Any, ...] | None
    unit: str | None
    help: str
    affects: Affects
    slot: str | None
    by_kind: bool = False  # a string is a kind of the slot, not the name of a component
    record: "type[Config] | None" = None  # the tables of a list


def field(
    default: Any = attrs.NOTHING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    multiple_of: int | None = None,
    choices: Iterable[Any] | None = None,
    unit: str | None = None,
    help: str = "",
    affects: Affects = "function",
) -> Any:
    """A plain value of a config; without a default it is required.

    `minimum` and `maximum` are inclusive, `above` is exclusive. `affects` says what a change means:
    another function computed, another way to train it, or another way to execute it. Only the first
    enters a model's fingerprint.
    """
    facts = {
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "multiple_of": multiple_of,
        "choices": None if choices is None else tuple(choices),
        "unit": unit,
        "help": help,
        "affects": affects,
        "slot": None,
    }
    return attrs.field(default=default, kw_only=True, metadata={_METADATA: facts})


def part(
    slot: str,
    *,
    optional: bool = False,
    by_kind: bool = False,
    help: str = "",
    affects: Affects = "function",
) -> Any:
    """A field that takes a part: a component's name, `{ use = "name", ... }` or a table with `kind`.

    When absent it is the spec's only component of that slot; `optional` allows there to be none, and
    then the value is None. With `by_kind` it is a kind of the slot, or a table with `kind`, and required.
    """
    facts = {"help": help, "affects": affects, "slot": slot, "optional": optional, "by_kind": by_kind}
    return attrs.field(default=None if optional else attrs.NOTHING, kw_only=True, metadata={_METADATA: facts})


def layer(*, help: str = "", affects: Affects = "function") -> Any:
    """A field that takes the parts of a layer, as an entry of `[[layers]]` does: `{ mixer = ..., ffn = ... }`.

    When absent the value is None.
    """
    facts = {"help": help, "affects": affects, "slot": LAYER, "optional": True}
    return attrs.field(default=None, kw_only=True, metadata={_METADATA: facts})


def records(record: "type[Config]", *, help: str = "", affects: Affects = "function") -> Any:
    """A field that takes a list of tables, each one a `record`; by default there are none. Their order counts."""
    facts = {"help": help, "affects": affects, "slot": None, "record": record}
    return attrs.field(default=(), kw_only=True, metadata={_METADATA: facts})


class Config:
    """Base of every config: states the tensors and costs of a part, without torch.

    Subclasses are made with `@config` and override what they have.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        # One for all: attrs would compile one for each class, whenever it is imported.
        values = (f"{each.name}={getattr(self, each.name)!r}" for each in getattr(type(self), "__attrs_attrs__", ()))
        return f"{type(self).__qualname__}({', '.join(values)})"

    def validate(self, site: "Site") -> Iterable[Problem]:
        """Yields every impossible combination of values; raises none."""
        return ()

    def filled(self, site: "Site") -> Self:
        """The same config with every default that depends on the site filled in; called once it is valid.

        Two configs that mean the same at a site become equal, and so do their fingerprints.
        """
        return self

    def tensors(self, site: "Site") -> Iterable["Declared"]:
        """The linear maps, weights and children of this part at `site`."""
        return ()

    def cost(self, site: "Site", phase: "Phase") -> Iterable["Cost"]:
        """What tensors can not tell: attention cores, caches, exchanges, saved activations."""
        return ()

    def conventions(self, site: "Site") -> Iterable["Convention"]:
        """Other ways in which these tensors are stored elsewhere; tried where a model differs from a trusted one."""
        return ()


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, layer, part, records))
def config(cls: type[T]) -> type[T]:
    """Makes a frozen, keyword-only, hashable config class."""
    return attrs.frozen(cls, kw_only=True, slots=False, repr=False)


def facts_of(cls: type[Config]) -> dict[str, FieldFacts]:
    """The fields of a config class by name, in order. Raises TypeError for a field no TOML value can fill."""
    return _facts_of(typing.cast(Any, cls))


@cache
def _facts_of(cls: Any) -> dict[str, FieldFacts]:
    hints = typing.get_type_hints(cls)
    return {a.name: _facts(cls, a, hints[a.name]) for a in attrs.fields(cls)}


def _facts(cls: type[Config], attribute: "attrs.Attribute[Any]", hint: Any) -> FieldFacts:
    stated = dict(attribute.metadata.get(_METADATA) or {})
    if not stated:
        raise TypeError(
            f"{cls.__name__}.{attribute.name} is not made with field(), part(), layer() or records()"
        )
    optional = bool(stated.pop("optional", False))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [m for m in typing.get_args(hint) if m is not type(None)]
        optional = optional or len(members) < len(typing.get_args(hint))
        hint = members[0] if len(members) == 1 else Any
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    kind = _SCALARS.get(hint)
    if typing.get_origin(hint) is Literal:
        stated["choices"] = stated.get("choices") or typing.get_args(hint)
        kind = _SCALARS.get(type(stated["choices"][0]))
    if stated["slot"] is None and kind is None and stated.get("record") is None:
        raise TypeError(
            f"{cls.__name__}.{attribute.name}: {hint} is not int, float, bool, str, a tuple of them, or optional"
        )
    empty: dict[str, Any] = dict.fromkeys(("minimum", "maximum", "above", "multiple_of", "choices", "unit"))
    required = attribute.default is attrs.NOTHING
    default = None if required else attribute.default
    return FieldFacts(
        name=attribute.name,
        kind=kind,
        many=many,
        optional=optional,
        required=required,
        default=default,
        **(empty | stated),
    )


Steps = tuple[str | int, ...]
Resolve = Callable[[FieldFacts, object, Steps], tuple[Any, list[Problem]]]


def check(
    cls: type[Config],
    data: Mapping[str, object],
    resolve: Resolve | None = None,
    reserved: Iterable[str] = (),
    above: Steps = (),
) -> tuple[dict[str, Any], list[Problem]]:
    """Reads a table against a config class: the values for its constructor, and every problem found.

    `resolve(facts, found, steps)` turns a part's reference (None when absent) into a part; `steps` lead to it
    from the table that was given first, `above` to this one. Keys in `reserved` belong to the spec language and
    are passed over.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    facts = facts_of(cls)
    skipped = frozenset(reserved)
    for key, found in data.items():
        if key not in facts and key not in skipped:
            allowed = (
                f"unknown key; allowed: {one_of(facts)}" if facts else "unknown key; this part has no fields"
            )
            shown = found if not isinstance(found, dict | list) else None
            # Nearest names take time, and a table can have as many unknown keys as fit in a file.
            near = nearest(key, (*facts, *skipped)) if len(problems) < 100 else None
            problems.append(Problem(key, shown, allowed, near))
    for name, fact in facts.items():
        if fact.slot is not None:
            if resolve is None:
                raise TypeError(f"{cls.__name__}.{name} takes a part, which nothing here can resolve")
            values[name], wrong = resolve(fact, data.get(name), (*above, name))
            problems.extend(wrong)
        elif fact.record is not None:
            values[name], wrong = _records(fact, fact.record, data.get(name, ()), resolve, (*above, name))
            problems.extend(wrong)
        elif name in data:
            values[name], wrong = _value(fact, data[name])
            problems.extend(wrong)
        elif fact.required:
            problems.append(Problem(name, None, f"is required: {describe(fact)}"))
    return values, problems


def _records(
    fact: FieldFacts, record: type[Config], found: object, resolve: Resolve | None, above: Steps
) -> tuple[Any, list[Problem]]:
    """The configs of a list of tables; of tables with problems there are none."""
    told = f"must be {describe(fact)}"
    if not isinstance(found, list | tuple):
        return (), [Problem(fact.name, found, told)]
    made: list[Config] = []
    problems: list[Problem] = []
    for index, table in enumerate(found):
        if not isinstance(table, Mapping):
            problems.append(Problem(f"{fact.name}.{index}", table, told))
            continue
        values, wrong = check(record, table, resolve, above=(*above, index))
        problems += [Problem(f"{fact.name}.{index}.{p.field}", p.found, p.allowed, p.nearest) for p in wrong]
        parts = [name for name, each in facts_of(record).items() if each.slot is not None]
        if not wrong and all(values[name] is not None for name in parts):
            made.append(record(**values))
    return tuple(made), problems


def plain(value: object) -> Any:
    """A config's value as data that TOML and JSON hold: a record is a table, a part its kind and values."""
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    if isinstance(value, Config):
        named = {name: plain(getattr(value, name)) for name in facts_of(type(value))}
        return {name: each for name, each in named.items() if each is not None}
    held = getattr(value, "config", None)
    if isinstance(held, Config):
        return {"kind": getattr(value, "kind", ""), **plain(held)}
    return value


def _value(fact: FieldFacts, found: object) -> tuple[Any, list[Problem]]:
    if not fact.many:
        reason = _refusal(fact, found)
        return _exact(fact, found), [] if reason is None else [
            Problem(fact.name, found, reason, _near(fact, found))
        ]
    if not isinstance(found, list | tuple):
        return None, [Problem(fact.name, found, f"must be a list, each element {describe(fact)}")]
    problems = []
    for index, element in enumerate(found):
        reason = _refusal(fact, element)
        if reason is not None:
            problems.append(Problem(f"{fact.name}.{index}", element, reason, _near(fact, element)))
    return tuple(_exact(fact, element) for element in found), problems


def _exact(fact: FieldFacts, found: object) -> object:
    return float(found) if fact.kind == "float" and type(found) is int and abs(found) < 2**1000 else found


def _near(fact: FieldFacts, found: object) -> str | None:
    return nearest(found, [str(c) for c in fact.choices]) if fact.choices and isinstance(found, str) else None


def _refusal(fact: FieldFacts, found: object) -> str | None:
    """Why `found` is not allowed, or None."""
    kind = _SCALARS.get(type(found))
    if kind != fact.kind and not (fact.kind == "float" and kind == "integer"):
        return f"must be {describe(fact)}"
    if fact.choices is not None and found not in fact.choices:
        return f"must be one of {one_of(str(c) for c in fact.choices)}"
    if isinstance(found, int | float) and not isinstance(found, bool):
        if isinstance(found, int) and abs(found) > LARGEST_INTEGER:
            return f"must be from {-LARGEST_INTEGER} to {LARGEST_INTEGER}"
        if not isfinite(found):
            return "must be finite"
        if fact.minimum is not None and found < fact.minimum:
            return f"must be >= {_number(fact.minimum)}"
        if fact.above is not None and found <= fact.above:
            return f"must be > {_number(fact.above)}"
        if fact.maximum is not None and found > fact.maximum:
            return f"must be <= {_number(fact.maximum)}"
        if fact.multiple_of is not None and found % fact.multiple_of:
            return f"must be a multiple of {fact.multiple_of}"
    return None


def describe(fact: FieldFacts) -> str:
    """What a field accepts, in words: `an integer >= 1 (features)`."""
    if fact.slot == LAYER:
        return "a table with a mixer and an ffn"
    if fact.record is not None:
        within = (f"{name} ({describe(each)})" for name, each in facts_of(fact.record).items())
        return f"a list of tables with {', '.join(within)}"
    if fact.kind is None:
        return f"a kind of {fact.slot}" if fact.by_kind else f"a {fact.slot} component"
    words = f"one of {one_of(str(c) for c in fact.choices)}" if fact.choices else _WORDS[fact.kind]
    for symbol, bound in ((">=", fact.minimum), (">", fact.above), ("<=", fact.maximum)):
        words += "" if bound is None else f" {symbol} {_number(bound)}"
    words += f", a multiple of {fact.multiple_of}" if fact.multiple_of else ""
    return f"{words} ({fact.unit})" if fact.unit else words


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else str(value)
