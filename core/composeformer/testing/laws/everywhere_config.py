"""Laws of every part about its config: frozen, without torch, and true to what it says of its fields.

Shapes: B rows, T tokens.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache, cached_property
from random import Random
from typing import Any

import attrs
import torch
from torch import Tensor

from composeformer.assemble import build, in_dtype
from composeformer.config import FieldFacts, facts_of
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.plugins import current
from composeformer.spec import Spec
from composeformer.testing.calling import uncalled
from composeformer.testing.case import Case, enliven, without_choices
from composeformer.testing.frame import frames
from composeformer.testing.law import EVERYWHERE, law
from composeformer.testing.subject import Subject

ROUNDS, TOKENS = 30, 24


def _described(subject: Subject) -> str | None:
    return "it is no part of a spec by itself" if subject.slot == "codec" else None


@law(
    EVERYWHERE,
    "config",
    "a config can not be changed, is hashable, equals its copy, and comes without torch",
    kills="config-can-be-changed",
    applies=_described,
    examples=3,
)
def config(case: Case) -> None:
    config = case.config
    case.equal(attrs.evolve(config), config, "a copy")
    case.equal(hash(attrs.evolve(config)), hash(config), "the hash of a copy")
    for name in facts_of(type(config)):
        try:
            setattr(config, name, getattr(config, name))
        except AttributeError:
            continue
        case.require(False, f"{type(config).__name__}.{name} can be set: the class is not frozen")
    owner = case.subject.registry.owner(case.subject.component)
    installed = {info.selector for info in current().registry.infos}
    brings = owner.selector in installed and brings_torch(owner.selector)
    case.require(not brings, f"plugin {owner}: loading it imports torch")


@cache
def brings_torch(selector: str) -> bool:
    """Whether torch is there once a plugin alone is loaded, in a process of its own."""
    told = "import sys; from composeformer.plugins import current; current(); print('torch' in sys.modules)"
    env = {**os.environ, "COMPOSE_PLUGINS": selector, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run([sys.executable, "-c", told], env=env, capture_output=True, text=True, check=True)
    return found.stdout.strip() == "True"


def _fields_apply(subject: Subject) -> str | None:
    if subject.implementation.name != "reference":
        return "its reference is tried, and it is as its reference"
    return uncalled(subject)


@law(
    EVERYWHERE,
    "fields",
    "each field that affects the function changes it, in some of many specs",
    kills="norm-eps-is-not-read",
    applies=_fields_apply,
    examples=2,
    shrinks=False,
)
def fields(case: Case) -> None:
    bases = Bases(case)
    for name, fact in facts_of(case.subject.component.config).items():
        if plain(fact) and next(values_beside(fact, fact.default, bases.moves), None) is not None:
            told = f"{name} changes nothing in any of {ROUNDS} specs"
            if not any(bases.matters(n, name, fact) for n in range(ROUNDS)):
                if 2 * bases.usable < ROUNDS:
                    case.draw.reject("most of what was drawn is no valid spec")
                case.require(False, told)


def plain(fact: FieldFacts) -> bool:
    """Whether a field is a value that the function depends on."""
    return fact.slot is None and fact.record is None and not fact.many and fact.affects == "function"


class Bases:
    """Specs to change a field in: drawn as cases are, and every other one moved further at random."""

    def __init__(self, case: Case) -> None:
        number = case.integer("moves", 0, 2**16)
        if not number:
            case.draw.reject("hypothesis begins with the simplest of all, where little matters")
        self.case, self.moves = case, Random(number)
        self._drawn: list[Base | None] = []

    def matters(self, number: int, name: str, fact: FieldFacts) -> bool:
        """Whether, in that spec, some other value of a field gives other tensors or other outputs."""
        while len(self._drawn) <= number:
            self._drawn.append(self._draw(len(self._drawn)))
        base = self._drawn[number]
        if base is None:
            return False
        for value in values_beside(fact, base.table(base.data).get(name, fact.default), self.moves):
            if base.differs(name, value):
                return True
        return False

    @property
    def usable(self) -> int:
        """How many of those drawn so far are valid."""
        return sum(each is not None for each in self._drawn)

    def _draw(self, number: int) -> "Base | None":
        case = self.case
        data = without_choices(case.draw(f"base {number}", frames(case.subject)))
        spec = spec_of(case, data)
        if spec is None:
            return None
        base = Base(case, data, spec)
        if not number % 2:
            return base
        facts = facts_of(case.subject.component.config)
        moved = deepcopy(data)
        table = base.table(moved)
        for name, fact in facts.items():
            if plain(fact) and self.moves.random() < 0.5:
                put(table, name, next(values_beside(fact, table.get(name, fact.default), self.moves), None))
        spec = spec_of(case, moved)
        return base if spec is None else Base(case, moved, spec)


class Base:
    """A spec that is valid, and what its model gives."""

    def __init__(self, case: Case, data: Any, spec: Spec) -> None:
        self.case, self.data, self.spec = case, data, spec
        node = case.find(spec)
        assert node is not None
        self.path = node.stated.paths[0]

    def table(self, data: Any) -> Any:
        """The part's own table in the data of a spec like this."""
        for step in self.path:
            data = data[step]
        return data

    @cached_property
    def model(self) -> Model:
        model = build(self.spec, seed=0)
        enliven(model, 0)
        return model

    @cached_property
    def outputs(self) -> Tensor:
        return outputs(self.model)

    def differs(self, name: str, value: object) -> bool:
        """Whether another value of a field gives other names or shapes of tensors, or else other outputs."""
        data = deepcopy(self.data)
        put(self.table(data), name, value)
        spec = spec_of(self.case, data)
        if spec is None:
            return False
        shapes = [{each: w.shape for each, w in one.plan.tensors.items()} for one in (self.spec, spec)]
        if shapes[0] != shapes[1]:
            return True
        other = build(spec, seed=0)
        other.load_state_dict(self.model.state_dict())
        found = outputs(other)
        return found.shape != self.outputs.shape or not torch.equal(found, self.outputs)


def put(table: Any, name: str, value: object) -> None:
    """Sets a value; None takes it out."""
    if value is None:
        table.pop(name, None)
    else:
        table[name] = value


def spec_of(case: Case, data: Any) -> Spec | None:
    """The spec of such data in float64; None where it is none, or none with the part in it."""
    try:
        spec = in_dtype(case.spec_of(data), "float64")
    except SpecError:
        return None
    return spec if case.find(spec) is not None else None


def outputs(model: Model) -> Tensor:
    """All logits (N,) of a model, its predictor's too, for a batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.spec.model.vocab_size, (2, TOKENS), generator=generator)
    with torch.no_grad():
        out = model(ids, predict=model.predictor is not None)
    return torch.cat([out.logits.flatten(), *(each.logits.flatten() for each in out.predictions)])


def values_beside(fact: FieldFacts, now: Any, moves: Random) -> Iterator[Any]:
    """Other values that a field may have, in random order; None is to leave it out."""
    found: list[Any] = []
    if fact.choices is not None:
        found = list(fact.choices)
    elif fact.kind == "boolean":
        found = [True, False]
    elif fact.kind == "integer":
        step = fact.multiple_of or 1
        n = now if isinstance(now, int) else step
        found = [n + step, n - step, 2 * n, n // 2, 16 * n, step, 2 * step, 3 * step]
    elif fact.kind == "float":
        x = now if isinstance(now, float) else 1.0
        found = [2 * x, x / 2, 16 * x, x / 16, x + 1, 1.0, 0.5, 4.0, 30.0]
    if fact.optional:
        found.append(None)
    moves.shuffle(found)
    yield from (value for value in found if value != now and allowed(fact, value))


def allowed(fact: FieldFacts, value: Any) -> bool:
    """Whether a number is within a field's limits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return True
    low = fact.minimum is None or value >= fact.minimum
    high = fact.maximum is None or value <= fact.maximum
    return low and high and (fact.above is None or value > fact.above) and not value % (fact.multiple_of or 1)
