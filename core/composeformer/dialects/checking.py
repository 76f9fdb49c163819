"""What can be known to be wrong with a dialect file before anybody has a model of its family.

A file pairs their names with ours, and only ours can be looked up: the kinds that it states, the fields that its keys
fill, the tensors that its lines move. Fields are looked up in the kinds that may stand there. Tensors need a model:
that of the class defaults, a config of nothing but its `model_type`, goes through the dialect both ways. Where the
defaults make no model, because a key has none or the tensors are needed, that part stays untried, and the reason is
told.
"""

from collections.abc import Iterable, Iterator, Sequence

import attrs

from composeformer.config import LAYER, Config, FieldFacts, facts_of
from composeformer.contracts import SLOTS
from composeformer.dialects import codings
from composeformer.dialects.dialect import Dialect
from composeformer.dialects.family import Family
from composeformer.errors import ComposeError, DialectError, SpecError, nearest, one_of, show
from composeformer.model_config import ModelConfig
from composeformer.plugins import current
from composeformer.registry import Registry
from composeformer.spec import Spec


@attrs.frozen(kw_only=True)
class Checked:
    """What is wrong with one file, a line each, and why a part of it could not be tried; empty where nothing is."""

    name: str
    slips: tuple[str, ...] = ()
    untried: str = ""


def check(text: str, label: str) -> Checked:
    """Checks a dialect file against all that is installed; `label` is what lines call it. Raises nothing for a slip."""
    registry = current().registry
    try:
        if codings.is_coding(text):
            coding = codings.parse(text, label)
            return Checked(name=coding.name, slips=tuple(_named(label, _coding(coding, registry))))
        dialect = Dialect(text, label)
    except ComposeError as error:
        return Checked(name=label, slips=error.lines)
    slips = list(_paths(dialect.family, registry))
    untried = ""
    if slips:
        untried = "tensors, for a model is needed, and these fields make none"
    elif dialect.source != "huggingface":
        untried = f"tensors, for {dialect.source} files are read by the tensors in them"
    else:
        found, untried = _model(dialect)
        slips += found
    return Checked(name=dialect.name, slips=tuple(_named(label, slips)), untried=untried)


def _named(label: str, lines: Iterable[str]) -> Iterator[str]:
    return (line if line.startswith(label) else f"{label}: {line}" for line in dict.fromkeys(lines))


def _paths(family: Family, registry: Registry) -> Iterator[str]:
    """Every path of ours that leads nowhere, with the line that states it."""
    stated = [(f"config.{key.theirs}", path) for key in family.keys for path in key.ours]
    stated += [(f"ours.{fixed.ours}", fixed.ours) for fixed in family.fixed]
    stated += [(f"patterns.{pattern.name}", pattern.ours) for pattern in family.patterns]
    for where, path in stated:
        reason = _nowhere(path, family, registry)
        if reason is not None:
            yield f"{where}: {show(path)} leads nowhere: {reason}"
    for path, kind in _kinds(family):
        slot = _slot(path, family, registry)
        if slot is not None and kind not in registry.kinds(slot):
            near = nearest(kind, registry.kinds(slot))
            hint = f"; did you mean {near!r}?" if near else ""
            yield f"{path} = {show(kind)}: unknown {slot} kind; allowed: {one_of(registry.kinds(slot))}{hint}"


def _kinds(family: Family) -> Iterator[tuple[str, str]]:
    """The kinds that a family states, with their paths: those it fixes, and what its keys may say."""
    for fixed in family.fixed:
        if fixed.ours.endswith(".kind"):
            yield fixed.ours, str(fixed.value)
    for key in family.keys:
        for path in key.ours:
            if path.endswith(".kind"):
                yield from ((path, str(kind)) for kind in (key.values or {}).values())


def _nowhere(path: str, family: Family, registry: Registry) -> str | None:
    """Why nothing is at a path; None where a field may be."""
    if path == "num_layers":
        return None
    head, *steps = path.split(".")
    slot, configs = head, _configs(head, head, family, registry)
    at = head
    for place, step in enumerate(steps):
        if step == "kind" and place == len(steps) - 1 and head != "model":
            return None
        if slot == LAYER:
            slot = step
        else:
            fields = _fields(configs)
            if step not in fields:
                near = nearest(step, fields)
                hint = f"; did you mean {near!r}?" if near else ""
                return f"{at} has no field {step!r}; it has: {one_of(fields)}{hint}"
            inner = fields[step].slot
            if inner is None:
                return None if place == len(steps) - 1 else f"{at}.{step} holds no part"
            slot = inner
        at = f"{at}.{step}"
        configs = [] if slot == LAYER else _configs(slot, at, family, registry)
    return None


def _slot(path: str, family: Family, registry: Registry) -> str | None:
    """The slot of the part whose kind a path states; None where it leads nowhere."""
    if _nowhere(path, family, registry) is not None:
        return None
    head, *steps = path.split(".")[:-1]
    slot, at = head, head
    for step in steps:
        inner = step if slot == LAYER else _fields(_configs(slot, at, family, registry))[step].slot
        assert inner is not None, path
        slot, at = inner, f"{at}.{step}"
    return slot if slot in SLOTS else None


def _configs(slot: str, at: str, family: Family, registry: Registry) -> list[type[Config]]:
    """The configs that may stand at a path: of the kinds stated there, or of all there are."""
    if slot == "model":
        return [ModelConfig]
    stated = [kind for path, kind in _kinds(family) if path == f"{at}.kind"]
    kinds = registry.kinds(slot)
    return [registry.get(slot, kind).config for kind in stated or kinds if kind in kinds]


def _fields(configs: Sequence[type[Config]]) -> dict[str, FieldFacts]:
    return {name: fact for each in configs for name, fact in facts_of(each).items()}


def _model(dialect: Dialect) -> tuple[list[str], str]:
    """What is wrong with the model of the class defaults, and why there is none."""
    try:
        spec = Spec.from_dict(dialect.to_spec({"model_type": dialect.model_type}))
    except (DialectError, SpecError) as error:
        return [], f"tensors, for the class defaults make no model: {error.lines[0]}"
    slips: list[str] = []
    for attempt in (dialect.rules, dialect.to_config):
        try:
            attempt(spec)
        except DialectError as error:
            slips += error.lines
    return slips, ""


def _coding(coding: codings.Coding, registry: Registry) -> Iterator[str]:
    """What is wrong with a coding: a codec or a policy that is not there, companions that it has not."""
    for slot, kind in (("codec", coding.codec), ("precision", str(coding.precision.get("kind")))):
        if kind not in registry.kinds(slot):
            yield f"{slot} = {show(kind)}: unknown {slot} kind; allowed: {one_of(registry.kinds(slot))}"
            return
    try:
        coding.stored("module.weight", (1, 1))
    except ComposeError as error:
        yield from error.lines
    fields = facts_of(registry.get("precision", str(coding.precision["kind"])).config)
    filled = [path.partition(".")[2] for key in coding.keys for path in key.ours]
    for name in (*coding.precision, *filled):
        if name != "kind" and name not in fields:
            yield f"precision.{name} leads nowhere: it has: {one_of(fields)}"
