"""What a plugin hands over, judged before it is registered; every fault is one line.

A config that can not be hashed, filled from TOML or trusted to stay as it is would fail later, far from
the plugin that brought it.
"""

import re
from collections.abc import Iterable
from typing import Any

from attrs.exceptions import FrozenInstanceError

from composeformer.config import Config, FieldFacts, check, facts_of
from composeformer.contracts import PHASES, SLOTS, Component, Implementation
from composeformer.errors import Problem, nearest, one_of

_KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What others read from the config of a slot's part.
ASKED = {
    "router": ("top_k",),
    "predictor": ("loss_weight",),
    "precision": ("activations", "format"),
    "codec": ("stored", "cut"),
    "comm": ("declared", "expected"),
}
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def components_refusal(items: Iterable[object]) -> str | None:
    """Why these can not all be registered by one plugin, or None."""
    kinds = set()
    defaults: dict[str, str] = {}
    for item in items:
        if not isinstance(item, Component):
            return f"it registers {item!r}, which is not a Component"
        reason = _component(item)
        if reason is not None:
            return f"{item.slot} {item.kind!r}: {reason}"
        if (item.slot, item.kind) in kinds:
            return f"{item.slot} {item.kind!r} is registered twice"
        kinds.add((item.slot, item.kind))
        if item.default and defaults.setdefault(item.slot, item.kind) != item.kind:
            return f"{item.slot} has two defaults, {defaults[item.slot]!r} and {item.kind!r}"
    return None


def files_refusal(items: Iterable[Any]) -> str | None:
    """Why these are not all TOML files of different names, or None."""
    names = set()
    for item in items:
        if not all(hasattr(item, attribute) for attribute in ("name", "is_file", "read_text")):
            return f"{item!r} is not a path"
        if not str(item.name).endswith(".toml"):
            return f"{item} is not a .toml file"
        if not item.is_file():
            return f"{item} does not exist"
        if item.name in names:
            return f"{item.name} is shipped twice"
        names.add(item.name)
    return None


def _component(component: Component) -> str | None:
    if component.slot not in SLOTS:
        near = nearest(str(component.slot), SLOTS)
        return f"unknown slot; allowed: {one_of(SLOTS)}" + (f"; did you mean {near!r}?" if near else "")
    if not (isinstance(component.kind, str) and _KIND.fullmatch(component.kind)):
        return "a kind is made of letters, digits, '-', '_' and '.'"
    if type(component.revision) is not int or component.revision < 1:
        return f"revision = {component.revision!r}: must be an integer >= 1"
    if component.strategy is not None and not _is_dotted(component.strategy):
        return f"strategy = {component.strategy!r}: must be 'package.module:name'"
    claims = component.claims
    if not isinstance(claims, tuple) or not all(isinstance(claim, str) for claim in claims):
        return f"claims = {component.claims!r}: must be a tuple of strings"
    return (
        _implementations(component.implementations)
        or _config(component.config)
        or _lacking(component.slot, component.config)
    )


def _implementations(found: object) -> str | None:
    if not isinstance(found, tuple) or not all(isinstance(each, Implementation) for each in found):
        return "implementations must be a tuple of Implementation"
    names = [each.name for each in found]
    if "reference" not in names:
        return f"no implementation named 'reference'; it has: {one_of(map(str, names))}"
    if len(set(names)) < len(names):
        return f"implementations of the same name: {one_of(map(str, names))}"
    for each in found:
        if not _is_dotted(each.module):
            return f"implementation {each.name!r}: module = {each.module!r}: must be 'package.module:Class'"
        if not isinstance(each.phases, tuple) or not each.phases or not set(each.phases) <= set(PHASES):
            return f"implementation {each.name!r}: phases = {each.phases!r}: must be some of {one_of(PHASES)}"
        if each.needs is not None and not callable(each.needs):
            return f"implementation {each.name!r}: needs must be a function or None"
    return None


def _is_dotted(name: object) -> bool:
    return isinstance(name, str) and _DOTTED.fullmatch(name) is not None


def _config(cls: object) -> str | None:
    if not (isinstance(cls, type) and issubclass(cls, Config)):
        return f"config = {cls!r}: must be a subclass of Config"
    if "__attrs_attrs__" not in vars(cls):
        return f"config {cls.__name__} must be decorated with @config"
    if not _is_frozen(cls):
        return f"config {cls.__name__} must be frozen: decorate it with @config"
    try:
        facts = facts_of(cls)
    except (TypeError, NameError) as error:
        return f"config {error}"
    return next((f"config {cls.__name__}.{problem}" for problem in _wrong_defaults(cls, facts)), None)


def _lacking(slot: str, cls: type[Config]) -> str | None:
    """What others ask of a slot's configs, and this one does not have."""
    for name in ASKED.get(slot, ()):
        if name not in facts_of(cls) and not hasattr(cls, name):
            return f"config {cls.__name__} has no {name}, which every {slot} has"
    return None


def _is_frozen(cls: type[Config]) -> bool:
    try:
        setattr(object.__new__(cls), next((a.name for a in vars(cls)["__attrs_attrs__"]), "any"), None)
    except FrozenInstanceError:
        return True
    except AttributeError:
        return False
    return False


def _wrong_defaults(cls: type[Config], facts: dict[str, FieldFacts]) -> list[Problem]:
    """The defaults that a spec would not be allowed to state, or that can change."""
    stated = {
        name: fact.default
        for name, fact in facts.items()
        if fact.slot is None and not fact.required and not (fact.optional and fact.default is None)
    }
    problems = [
        Problem(name, value, "the default must be a tuple")
        for name, value in stated.items()
        if facts[name].many and not isinstance(value, tuple)
    ]
    _, wrong = check(cls, stated, resolve=lambda fact, found, steps: (None, []))
    required = {name for name, fact in facts.items() if fact.required}
    return problems + [problem for problem in wrong if problem.field not in required]
