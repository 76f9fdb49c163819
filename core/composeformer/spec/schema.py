"""A JSON Schema (draft 2020-12) of specs, for the plugins that are installed.

Editors complete and check a spec against it. It says what the parser accepts, field by field, from the
same facts; what only a model as a whole can tell (a divisibility, a name that no component has) is the
parser's alone.
"""

from typing import Any

from composeformer.config import Config, FieldFacts, describe, facts_of
from composeformer.contracts import PHASES, SINGLE, SLOTS, Component
from composeformer.model_config import ModelConfig, TrainConfig
from composeformer.registry import Registry
from composeformer.spec.resolve import MAX_LAYERS, SUBLAYERS

_TYPES = {"integer": "integer", "float": "number", "boolean": "boolean", "string": "string"}


def schema(registry: Registry) -> dict[str, Any]:
    """The schema as one JSON document. A spec that `extends` another may leave out what it inherits."""
    definitions: dict[str, Any] = {}
    for slot in SLOTS:
        kinds = sorted(registry.kinds(slot))
        for kind in kinds:
            definitions[f"{slot}.{kind}"] = _component(registry.get(slot, kind))
        definitions[f"{slot}.reference"] = _reference(slot, kinds)
        # A table without `kind` is legal only where an inherited one states it; `extends` may be that.
        definitions[f"{slot}.component"] = {"oneOf": [{"$ref": f"#/$defs/{slot}.{kind}"} for kind in kinds] or [False]}
    definitions["layers"] = _layers()
    properties: dict[str, Any] = {
        "format": {"const": 1},
        "name": {"type": "string"},
        "description": {"type": "string"},
        "source": {"type": "string", "description": "Where the values come from."},
        "unverified": {"type": "array", "items": {"type": "string"}, "description": "Paths of values without a source."},
        "extends": {"type": "string", "description": "A shipped spec's name, or a path relative to this file."},
        "model": _table(ModelConfig, "What every part of a model shares."),
        "train": _table(TrainConfig, "One run's sizes."),
        "layers": {"$ref": "#/$defs/layers"},
    }
    for slot, meaning in SLOTS.items():
        one = {"$ref": f"#/$defs/{slot}.component"}
        if slot in SINGLE:
            properties[slot] = {"description": meaning, **one}
        else:
            several = {"type": "object", "not": {"required": ["kind"]}, "additionalProperties": one}
            properties[slot] = {"description": meaning, "if": {"required": ["kind"]}, "then": one, "else": several}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "composeformer spec",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "if": {"required": ["extends"]},
        "else": {"required": ["model", "layers"]},
        "$defs": definitions,
    }


def _table(cls: type[Config], summary: str) -> dict[str, Any]:
    facts = facts_of(cls)
    return {
        "type": "object",
        "description": summary,
        "properties": {name: field_schema(fact) for name, fact in facts.items()},
        "required": [name for name, fact in facts.items() if fact.required and fact.slot is None],
        "additionalProperties": False,
    }


def _component(component: Component) -> dict[str, Any]:
    table = _table(component.config, component.summary)
    names = ["auto", *(i.name for i in component.implementations)]
    choice = {"enum": names}
    by_phase = {"type": "object", "properties": dict.fromkeys(PHASES, choice), "additionalProperties": False}
    table["properties"] = {
        "kind": {"const": component.kind},
        "implementation": {"anyOf": [choice, by_phase], "default": "auto"},
        **table["properties"],
    }
    table["required"] = ["kind", *table["required"]]
    return table


def _reference(slot: str, kinds: list[str]) -> dict[str, Any]:
    use = {"type": "object", "properties": {"use": {"type": "string"}}, "required": ["use"], "not": {"required": ["kind"]}}
    inline = [{"$ref": f"#/$defs/{slot}.{kind}"} for kind in kinds]
    return {"anyOf": [{"type": "string", "description": f"The name of a {slot} component."}, use, *inline]}


def field_schema(fact: FieldFacts) -> dict[str, Any]:
    """The schema of one field."""
    if fact.slot is not None:
        return {"$ref": f"#/$defs/{fact.slot}.reference", "description": fact.help}
    one: dict[str, Any] = {"type": _TYPES[str(fact.kind)]}
    for key, value in (
        ("minimum", fact.minimum), ("maximum", fact.maximum), ("exclusiveMinimum", fact.above), ("multipleOf", fact.multiple_of)
    ):
        if value is not None:
            one[key] = value
    if fact.choices is not None:
        one["enum"] = list(fact.choices)
    whole: dict[str, Any] = {"type": "array", "items": one} if fact.many else one
    whole["description"] = f"{fact.help} ({describe(fact)})" if fact.help else describe(fact)
    if not fact.required and fact.default is not None:
        whole["default"] = list(fact.default) if isinstance(fact.default, tuple) else fact.default
    return whole


def _layers() -> dict[str, Any]:
    repeat = {"type": "integer", "minimum": 1, "maximum": MAX_LAYERS, "default": 1}
    part = {slot: {"anyOf": [{"const": False}, {"$ref": f"#/$defs/{slot}.reference"}]} for slot in SUBLAYERS}
    entry = {"type": "object", "properties": {"repeat": repeat, **part}, "additionalProperties": False}
    pattern = {
        "type": "object",
        "properties": {"repeat": repeat, "layers": {"$ref": "#/$defs/layers"}},
        "required": ["layers"],
        "additionalProperties": False,
    }
    return {"type": "array", "minItems": 1, "items": {"if": {"required": ["layers"]}, "then": pattern, "else": entry}}
