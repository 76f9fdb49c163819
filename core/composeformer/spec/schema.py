"""A JSON Schema (draft 2020-12) of specs, for the plugins that are installed.

Editors complete and check a spec against it. It says what the parser accepts, field by field, from the
same facts; what only a model as a whole can tell (a divisibility, a name that no component has, a number of
layers) is the parser's alone.

Each table is defined twice: with what must be in it, and, as `partial`, without. A spec that `extends`
another may leave out what it inherits, so there the partial ones hold.
"""

from collections.abc import Iterable
from typing import Any

from composeformer.config import LARGEST_INTEGER, LAYER, Config, FieldFacts, describe, facts_of
from composeformer.contracts import PHASES, SINGLE, SLOTS, SUBLAYERS, Component
from composeformer.cost_config import CostConfig
from composeformer.model_config import ModelConfig, ParallelConfig, TrainConfig
from composeformer.registry import Registry
from composeformer.spec.layers import MAX_LAYERS

Schema = dict[str, Any]

_TYPES = {"integer": "integer", "float": "number", "boolean": "boolean", "string": "string"}


def schema(registry: Registry) -> Schema:
    """The schema as one JSON document."""
    definitions: Schema = {}
    for slot in SLOTS:
        kinds = sorted(registry.kinds(slot))
        for kind in kinds:
            definitions |= _component(registry.get(slot, kind))
        definitions[f"{slot}.reference"] = _reference(slot, kinds)
        definitions[f"{slot}.kinds"] = {"enum": kinds} if kinds else {"not": {}}
        for whole in ("", ".partial"):
            tables = [_ref(f"{slot}.{kind}{whole}") for kind in kinds]
            definitions[f"{slot}.component{whole}"] = {"anyOf": tables} if tables else {"not": {}}
    definitions |= _config("model", ModelConfig, "What every part of a model shares.")
    definitions |= _config("train", TrainConfig, "One run's sizes.")
    definitions |= _config("parallel", ParallelConfig, "How a run is spread over processes.")
    definitions |= _config("cost", CostConfig, "What a run is priced by.")
    definitions["layers"] = _layers()
    plain: Schema = {
        "format": {"const": 1, "description": "The format of specs that this version reads."},
        "name": {"type": "string"},
        "description": {"type": "string"},
        "source": {"type": "string", "description": "Where the values come from."},
        "unverified": _strings("Paths of values without a source."),
        "extends": {"type": "string", "description": "A shipped spec, or a path relative to this file."},
        "layers": _ref("layers"),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "composeformer spec",
        "type": "object",
        "properties": plain | {key: {} for key in ("model", "train", "parallel", "cost", *SLOTS)},
        "additionalProperties": False,
        "if": {"required": ["extends"]},
        "then": {"properties": _tables(".partial")},
        "else": {"properties": _tables(""), "required": ["model", "layers"]},
        "$defs": definitions,
    }


def field_schema(fact: FieldFacts) -> Schema:
    """The schema of one field."""
    if fact.slot == LAYER:
        return {
            "type": "object",
            "properties": _sublayers(),
            "additionalProperties": False,
            "description": fact.help,
        }
    if fact.record is not None:
        facts = facts_of(fact.record)
        table = {
            "type": "object",
            "properties": {name: field_schema(each) for name, each in facts.items()},
            "required": [name for name, each in facts.items() if each.required],
            "additionalProperties": False,
        }
        return {"type": "array", "items": table, "description": fact.help}
    if fact.by_kind:
        kind = {"anyOf": [_ref(f"{fact.slot}.kinds"), _ref(f"{fact.slot}.component")]}
        return {**kind, "description": fact.help}
    if fact.slot is not None:
        return {**_ref(f"{fact.slot}.reference"), "description": fact.help}
    one: Schema = {"type": _TYPES[str(fact.kind)]}
    if fact.kind == "integer":
        one |= {"minimum": -LARGEST_INTEGER, "maximum": LARGEST_INTEGER}
    bounds = {
        "minimum": fact.minimum,
        "maximum": fact.maximum,
        "exclusiveMinimum": fact.above,
        "multipleOf": fact.multiple_of,
    }
    one |= {key: bound for key, bound in bounds.items() if bound is not None}
    if fact.choices is not None:
        one["enum"] = list(fact.choices)
    whole: Schema = {"type": "array", "items": one} if fact.many else one
    whole["description"] = f"{fact.help} ({describe(fact)})" if fact.help else describe(fact)
    if not fact.required and fact.default is not None:
        whole["default"] = list(fact.default) if isinstance(fact.default, tuple) else fact.default
    return whole


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _strings(description: str) -> Schema:
    return {"type": "array", "items": {"type": "string"}, "description": description}


def _tables(whole: str) -> Schema:
    """The top-level tables, each in full, or `.partial`."""
    tables: Schema = {name: _ref(f"{name}{whole}") for name in ("model", "train", "parallel", "cost")}
    for slot, meaning in SLOTS.items():
        one = _ref(f"{slot}.component{whole}")
        several = {"type": "object", "additionalProperties": one}
        if slot in SINGLE:
            tables[slot] = {"description": meaning, **one}
        elif whole:
            tables[slot] = {"description": meaning, "anyOf": [one, several]}
        else:
            either = {"if": {"required": ["kind"]}, "then": one, "else": several}
            tables[slot] = {"description": meaning, **either}
    return tables


def _config(name: str, cls: type[Config], summary: str, more: Schema | None = None) -> Schema:
    """A config's two definitions."""
    facts = facts_of(cls)
    required = [field for field, fact in facts.items() if fact.required and fact.slot is None]
    table = {
        "type": "object",
        "description": summary,
        "properties": {**(more or {}), **{field: field_schema(fact) for field, fact in facts.items()}},
        "additionalProperties": False,
    }
    required = (["kind"] if more else []) + required
    return {f"{name}.partial": table, name: {**_ref(f"{name}.partial"), "required": required}}


def _component(component: Component) -> Schema:
    phases = {p: _choice(i.name for i in component.implementations if p in i.phases) for p in PHASES}
    everywhere = _choice(i.name for i in component.implementations if set(PHASES) <= set(i.phases))
    by_phase = {"type": "object", "properties": phases, "additionalProperties": False}
    more: Schema = {
        "kind": {"const": component.kind},
        "implementation": {"anyOf": [everywhere, by_phase], "default": "auto"},
    }
    return _config(f"{component.slot}.{component.kind}", component.config, component.summary, more)


def _choice(names: Iterable[str]) -> Schema:
    return {"enum": ["auto", *names]}


def _reference(slot: str, kinds: list[str]) -> Schema:
    """What a field that takes a part accepts. A refinement has any keys: only the parser knows the kind."""
    use = {
        "type": "object",
        "properties": {"use": {"type": "string"}},
        "required": ["use"],
        "not": {"required": ["kind"]},
    }
    name = {"type": "string", "description": f"The name of a {slot} component."}
    return {"anyOf": [name, use, *(_ref(f"{slot}.{kind}") for kind in kinds)]}


def _sublayers() -> Schema:
    return {slot: {"anyOf": [{"const": False}, _ref(f"{slot}.reference")]} for slot in SUBLAYERS}


def _layers() -> Schema:
    repeat = {"type": "integer", "minimum": 1, "maximum": MAX_LAYERS, "default": 1}
    parts = {"repeat": repeat, **_sublayers()}
    entry = {"type": "object", "properties": parts, "additionalProperties": False}
    pattern = {
        "type": "object",
        "properties": {"repeat": repeat, "layers": _ref("layers")},
        "required": ["layers"],
        "additionalProperties": False,
    }
    items = {"if": {"required": ["layers"]}, "then": pattern, "else": entry}
    return {"type": "array", "minItems": 1, "items": items}
