"""What two specs say otherwise, as changes: specs written out part by part, and compared leaf by leaf.

Written out, a spec names nothing: each layer holds its parts' tables with every value, defaults of its site included,
so that each place can be changed alone, and two specs that name their parts otherwise are alike. What differs in the
same way at several places is one change: a component is stated once and used in many layers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from composeformer.config import LAYER, Config, facts_of, plain
from composeformer.contracts import PHASES, SUBLAYERS, LayerParts, Part
from composeformer.errors import show
from composeformer.model_config import ModelConfig
from composeformer.plan import Node
from composeformer.registry import Registry
from composeformer.spec import Spec
from composeformer.store.bisecting.change import Change, Steps

Data = dict[str, Any]

ENDS = ("embedding", "residual", "head", "predictor")
# Of how a model is run; a variant is run as the model was.
KEPT = ("precision", "comm")


def written_out(spec: Spec) -> Data:
    """The spec as data without names: `Spec` makes of it a model of the same tensors and function."""
    plan = spec.plan
    found: Data = {"format": 1, "name": spec.name, "model": plain(spec.model)}
    for slot in ENDS:
        node: Node | None = getattr(plan, slot)
        if node is not None:
            found[slot] = _table(node.part, node)
    found["layers"] = [
        {slot: _table(nodes[slot].part, nodes[slot]) if slot in nodes else False for slot in SUBLAYERS}
        for nodes in plan.layers
    ]
    stated = spec.to_dict()
    return found | {slot: stated[slot] for slot in KEPT if slot in stated}


def _table(part: Part, node: Node) -> Data:
    """A part as a table with its kind, its children as they were built."""
    found: Data = {"kind": part.kind}
    if any(part.chosen(phase) != "auto" for phase in PHASES):
        found["implementation"] = dict(part.implementation)
    return found | _values(part.config, node)


def _values(config: Config, node: Node) -> Data:
    found: Data = {}
    for name, facts in facts_of(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, LayerParts):
            held = {slot: _below(part, node) for slot, part in value.items()}
            found[name] = {slot: held.get(slot, False) for slot in SUBLAYERS}
        elif isinstance(value, Part):
            found[name] = _below(value, node)
        elif facts.record is not None:
            found[name] = [_values(each, node) for each in value]
        elif value is not None:
            found[name] = plain(value)
    return found


def _below(part: Part, node: Node) -> Data:
    """A part held in a field: with what its site fills in, where it was built."""
    built = next((child for child in node.children.values() if child.stated is part), None)
    return _table(part, node) if built is None else _table(built.part, built)


def differences(ours: Data, theirs: Data, registry: Registry) -> list[Change]:
    """What one written-out spec says otherwise than the other, of the function alone; alike leaves as one change."""
    groups: dict[tuple[str, str, str], list[tuple[Steps, Any, Any]]] = {}
    for steps, slot, x, y in _leaves(ours, theirs, registry):
        name = f"{slot}.{steps[-1]}" if slot else str(steps[-1])
        groups.setdefault((name, repr(x), repr(y)), []).append((steps, x, y))
    found = []
    for (name, _, _), leaves in groups.items():
        _, x, y = leaves[0]
        found.append(
            Change(
                source="spec",
                name=name,
                here=words(x, y),
                there=words(y, x),
                where=tuple(dict.fromkeys(dotted(steps[:-1] or steps) for steps, _, _ in leaves)),
                edits=tuple((steps, y) for steps, _, y in leaves),
            )
        )
    return found


def _leaves(ours: Data, theirs: Data, registry: Registry) -> Iterator[tuple[Steps, str, Any, Any]]:
    """Path, slot of the part around it, and the two values, of every field that differs."""
    yield from _fields(ModelConfig, ours["model"], theirs["model"], ("model",), "model", registry)
    for index, (x, y) in enumerate(zip(ours["layers"], theirs["layers"])):
        for slot in SUBLAYERS:
            yield from _parts(slot, x[slot], y[slot], ("layers", index, slot), "", registry)
    for slot in ENDS:
        yield from _parts(slot, ours.get(slot), theirs.get(slot), (slot,), "", registry)


def _parts(
    slot: str, x: Any, y: Any, steps: Steps, around: str, registry: Registry
) -> Iterator[tuple[Steps, str, Any, Any]]:
    if isinstance(x, dict) and isinstance(y, dict) and x["kind"] == y["kind"]:
        yield from _fields(registry.get(slot, x["kind"]).config, x, y, steps, slot, registry)
    elif x != y:
        yield steps, around, x, y


def _fields(
    cls: type[Config], x: Data, y: Data, steps: Steps, slot: str, registry: Registry
) -> Iterator[tuple[Steps, str, Any, Any]]:
    for name, facts in facts_of(cls).items():
        a, b, below = x.get(name), y.get(name), (*steps, name)
        if facts.affects != "function" or a == b:
            continue
        if facts.slot == LAYER and a and b:
            for each in SUBLAYERS:
                yield from _parts(each, a[each], b[each], (*below, each), "", registry)
        elif facts.slot is not None and facts.slot != LAYER:
            yield from _parts(facts.slot, a, b, below, slot, registry)
        else:
            yield below, slot, a, b


def choices(data: Data, kinds: set[tuple[str, str]], registry: Registry) -> list[Change]:
    """Every other choice that the fields of parts of these slots and kinds have, each for all such parts at once."""
    groups: dict[tuple[str, str, str, str], list[Steps]] = {}
    values: dict[tuple[str, str, str, str], tuple[Any, Any]] = {}
    for steps, slot, table in tables(data, registry):
        if (slot, table["kind"]) not in kinds:
            continue
        for name, facts in facts_of(registry.get(slot, table["kind"]).config).items():
            if facts.affects != "function" or facts.many or facts.slot is not None:
                continue
            now = table.get(name)
            offered = (False, True) if facts.kind == "boolean" else facts.choices or ()
            for other in offered:
                if now is not None and other != now:
                    key = (slot, name, repr(now), repr(other))
                    groups.setdefault(key, []).append((*steps, name))
                    values[key] = now, other
    return [
        Change(
            source="choice",
            name=f"{key[0]}.{key[1]}",
            here=show(values[key][0]),
            there=show(values[key][1]),
            where=tuple(dotted(steps[:-1]) for steps in places),
            edits=tuple((steps, values[key][1]) for steps in places),
        )
        for key, places in groups.items()
    ]


def tables(data: Data, registry: Registry) -> Iterator[tuple[Steps, str, Data]]:
    """Every part's table with its path and slot; parents come before what is in them."""
    for index, layer in enumerate(data["layers"]):
        for slot in SUBLAYERS:
            yield from _tables(layer[slot], ("layers", index, slot), slot, registry)
    for slot in ENDS:
        yield from _tables(data.get(slot), (slot,), slot, registry)


def _tables(table: Any, steps: Steps, slot: str, registry: Registry) -> Iterator[tuple[Steps, str, Data]]:
    if not isinstance(table, dict):
        return
    yield steps, slot, table
    for name, facts in facts_of(registry.get(slot, table["kind"]).config).items():
        below = table.get(name)
        if facts.slot == LAYER and isinstance(below, dict):
            for each in SUBLAYERS:
                yield from _tables(below[each], (*steps, name, each), each, registry)
        elif facts.slot is not None:
            yield from _tables(below, (*steps, name), facts.slot, registry)


def edited(data: Data, edits: Mapping[Steps, Any]) -> Data:
    """A copy with values set at their paths; what is None is taken away."""
    found: Data = _copied(data)
    for steps, value in edits.items():
        *above, last = steps
        held: Any = found
        for step in above:
            held = held[step]
        if value is None:
            held.pop(last, None)
        else:
            held[last] = _copied(value)
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def words(value: Any, other: Any) -> str:
    """A value beside the one that stands in its place, as a user would say it; of two parts what they do not share."""
    if value is None or (value is False and isinstance(other, dict)):
        return "none"
    if not isinstance(value, dict):
        return show(value)
    if "kind" not in value:
        return show(" and ".join(words(each, None) for each in value.values()))
    shared = other if isinstance(other, dict) else {}
    stated = ", ".join(
        f"{key} = {show(each)}"
        for key, each in value.items()
        if key != "kind" and not isinstance(each, dict | list) and shared.get(key) != each
    )
    return f"{value['kind']} ({stated})" if stated else str(value["kind"])


def dotted(steps: Steps) -> str:
    return ".".join(str(step) for step in steps)
