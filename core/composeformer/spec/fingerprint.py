"""The fingerprint: a hash of the function that an architecture computes, given its weights.

It hashes the expanded layers without component names: slot, kind, revision, and every field that affects
the function and differs from its default. Reformatting, renaming and run tables leave it alone; a changed
meaning does not.
"""

import json
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from composeformer.config import Config, facts_of
from composeformer.contracts import LayerParts, Part
from composeformer.plan import Node

if TYPE_CHECKING:
    from composeformer.spec.spec import Spec


def meaning(spec: "Spec") -> dict[str, Any]:
    """What the fingerprint hashes, as plain data; two models compute the same function when it is equal."""
    plan = spec.plan
    ends: dict[str, Node | None] = {
        "embedding": plan.embedding,
        "residual": plan.residual,
        "head": plan.head,
        "predictor": plan.predictor,
    }
    return {
        "model": _fields(spec.model, None),
        "ends": {slot: _node(node) for slot, node in ends.items() if node is not None},
        "layers": [{slot: _node(node) for slot, node in layer.items()} for layer in plan.layers],
    }


def fingerprint(spec: "Spec") -> str:
    """SHA-256 of `meaning`, in hexadecimal."""
    text = json.dumps(meaning(spec), sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()


def _node(node: Node) -> dict[str, Any]:
    return _part(node.part, node)


def _part(part: Part, node: Node | None) -> dict[str, Any]:
    return {"kind": part.kind, "revision": part.component.revision, "fields": _fields(part.config, node)}


def _fields(config: Config, node: Node | None) -> dict[str, Any]:
    stated: dict[str, Any] = {}
    for name, facts in facts_of(type(config)).items():
        value = getattr(config, name)
        if facts.affects != "function" or (not facts.required and value == facts.default):
            continue
        if isinstance(value, LayerParts):
            stated[name] = {slot: _below(part, node) for slot, part in value.items()}
        elif facts.record is not None:
            stated[name] = [_fields(each, node) for each in value]
        else:
            stated[name] = _below(value, node) if isinstance(value, Part) else value
    return stated


def _below(part: Part, node: Node | None) -> dict[str, Any]:
    """A part held in a field: as it was built, where it was, so that its site's defaults count."""
    for child in node.children.values() if node is not None else ():
        if child.stated is part:
            return _node(child)
    return _part(part, None)
