"""Which number format each tensor of a model has: a policy, and ordered rules that name exceptions by role.

A role is the dotted name of a linear map (`layers.3.mixer.q_a`), or the full name of a plain weight. The first rule
that matches decides, then the policy; what a rule names is no exception of the policy's any more: a sensitive map
is as the rule says. The formats that rules give are those of precision components, so every plugin's can be mixed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import attrs

from composeformer.blame import blame
from composeformer.config import Config, config, field, part, records
from composeformer.contracts import Linear, Part, Weight
from composeformer.errors import PluginError, Problem, nearest, one_of, show
from composeformer.formats import BITS, Format
from composeformer.rounding import Rounding, of_format

if TYPE_CHECKING:
    from composeformer.plan import Plan
    from composeformer.registry import Registry


@config
class Rule(Config):
    """What the roles that match are formatted as."""

    roles: str = field(
        affects="execution",
        help="Dotted names; `*` stands for any text, and a part's name for all that is in it.",
    )
    format: Part = part("precision", by_kind=True, affects="execution", help="Whose formats they have.")


@config
class Precision(Config):
    """Base of the configs of precision components, which add `activations` and `format` (`formats.PrecisionConfig`)."""

    rules: tuple[Rule, ...] = records(
        Rule, affects="execution", help="Exceptions by role; the first that matches decides."
    )

    def rounding(self, role: str, weight: Weight, sensitive: bool) -> Rounding:
        """The declared error of a linear map, of which `format` is asked the same: what its format says of itself."""
        form: Format = self.format(role, weight, sensitive)  # type: ignore[attr-defined]
        return of_format(form)


def matches(roles: str, name: str) -> bool:
    """Whether a rule's `roles` name this role or weight: itself, or a part that it is in."""
    return _pattern(roles).fullmatch(name) is not None


@cache
def _pattern(roles: str) -> re.Pattern[str]:
    return re.compile(f"{'.*'.join(map(re.escape, roles.split('*')))}([.].*)?", re.DOTALL)


class Formats:
    """The formats of one model's tensors, as its precision policy and the rules give them."""

    def __init__(self, policy: Part, plan: "Plan", registry: "Registry") -> None:
        self.policy = policy
        self.plan = plan
        self._registry = registry
        self.rules: Sequence[Rule] = getattr(policy.config, "rules", ())
        self._codecs: dict[str, Any] = {}

    @cached_property
    def activations(self) -> str:
        """The dtype of the residual stream and of what mixers cache."""
        with blame(self._registry, self.policy, "precision", "its activations"):
            return _known(str(self.policy.config.activations))

    def rule(self, name: str) -> int | None:
        """The number of the first rule that names a role or weight, from 0."""
        return next((i for i, rule in enumerate(self.rules) if matches(rule.roles, name)), None)

    def decides(self, name: str) -> Part:
        """The policy that formats a role or weight: that of a rule, or the model's."""
        number = self.rule(name)
        return self.policy if number is None else self.rules[number].format

    def of(self, name: str, weight: Weight, linear: Linear | None) -> Format:
        """The format of a tensor: `name` is its map's role, or a plain weight's full name (then `linear` is None)."""
        number = self.rule(name)
        policy = self.decides(name)
        sensitive = linear is None or (number is None and linear.sensitive)
        with blame(self._registry, policy, name, "its format"):
            found: Format = policy.config.format(name, weight, sensitive)
            _known(found.storage)
        if number is None:
            return found
        return attrs.evolve(found, why=f"rule {number + 1}, {self.rules[number].roles!r}: {found.why}")

    @cached_property
    def tensors(self) -> Mapping[str, Format]:
        """The format of every tensor of the plan, by its full name."""
        linears = self.plan.linears
        found = {}
        for name, weight in self.plan.tensors.items():
            role = name.rpartition(".")[0]
            linear = linears.get(role)
            found[name] = self.of(name if linear is None else role, weight, linear)
        return found

    @cached_property
    def shared(self) -> Mapping[str, Format]:
        """The format of every name that is another tensor: stored as that is, multiplied as its own map says."""
        linears = self.plan.linears
        found = {}
        for name, target in self.plan.aliases.items():
            role = name.rpartition(".")[0]
            held = self.tensors[target]
            if role in linears:
                own = self.of(role, linears[role].weight, linears[role])
                kept = {
                    field: getattr(held, field)
                    for field in ("storage", "codec", "gather", "gradient", "moment")
                }
                held = attrs.evolve(own, **kept, why=f"{own.why}; the tensor is {target}")
            found[name] = held
        return found

    def at(self, name: str) -> Format:
        """The format of a tensor of the plan, or of another name of one."""
        return self.tensors[name] if name in self.tensors else self.shared[name]

    def trains(self, name: str) -> bool:
        """Whether a tensor of the plan is a parameter: it was declared to train, and is not stored as codes."""
        return self.plan.tensors[name].trains and self.tensors[name].codec is None

    @cached_property
    def stored(self) -> Mapping[str, Weight]:
        """Every tensor as a model holds and a folder stores it, by full name, with its dtype: codes and scales where
        a format has a codec. Raises PluginError for a codec that no plugin brings.
        """
        found: dict[str, Weight] = {}
        for name, weight in self.plan.tensors.items():
            form = self.tensors[name]
            if form.codec is None:
                found[name] = attrs.evolve(weight, name=name, dtype=form.storage)
            else:
                found |= {each.name: each for each in self._held(name)}
        return found

    @cached_property
    def coded(self) -> Mapping[str, tuple[str, ...]]:
        """The names of what holds each coded tensor, its codes first, by its full name."""
        held = (name for name, form in self.tensors.items() if form.codec is not None)
        return {name: tuple(each.name for each in self._held(name)) for name in held}

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """The names that are another stored tensor, and which; codes and scales of an alias each."""
        found: dict[str, str] = {}
        for name, target in self.plan.aliases.items():
            found |= {name + held.removeprefix(target): held for held in self.coded.get(target, (target,))}
        return found

    def _held(self, name: str) -> tuple[Weight, ...]:
        """What holds a coded tensor, as its codec says. Raises PluginError, which names it, where that fails."""
        form, weight = self.tensors[name], attrs.evolve(self.plan.tensors[name], name=name)
        config = self.codec(form)
        with blame(self._registry, self._registry.get("codec", str(form.codec)), name, "its stored tensors"):
            held: tuple[Weight, ...] = tuple(config.stored(weight))
            for each in held:
                _known(str(each.dtype))
        return held

    def codec(self, form: Format) -> Any:
        """The config of a format's codec, with its defaults."""
        kind = str(form.codec)
        if kind not in self._codecs:
            if kind not in self._registry.kinds("codec"):
                told = f"stores by a codec {kind!r}, which no plugin brings"
                raise PluginError(f"the precision {self.policy.kind} {told}")
            component: Any = self._registry.get("codec", kind)
            self._codecs[kind] = component.config()
        return self._codecs[kind]

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the rules: one that names nothing, or has rules of its own."""
        linears = self.plan.linears
        names = dict.fromkeys(linears)
        names |= dict.fromkeys(n for n in self.plan.tensors if n.rpartition(".")[0] not in linears)
        for number, rule in enumerate(self.rules):
            place = f"rules.{number}"
            if getattr(rule.format.config, "rules", ()):
                yield Problem(f"{place}.format.rules", None, "a rule's format has no rules of its own")
            if not any(matches(rule.roles, name) for name in names):
                patterns = dict.fromkeys(starred(name) for name in names)
                near = nearest(rule.roles, patterns)
                told = "matches no linear map and no weight of this model; `compose show` lists them"
                yield Problem(f"{place}.roles", rule.roles, told, near)
        yield from self._uncoded()

    def _uncoded(self) -> Iterator[Problem]:
        """Rules whose codes nothing could be stored as, for all that they decide is another tensor."""
        decided: dict[int, list[str]] = {}
        for name in (*self.plan.tensors, *self.plan.aliases):
            role = name.rpartition(".")[0]
            number = self.rule(role if role in self.plan.linears else name)
            if number is not None:
                decided.setdefault(number, []).append(name)
        for number, names in decided.items():
            if any(name in self.plan.tensors for name in names):
                continue
            linear = self.plan.linears.get(names[0].rpartition(".")[0])
            if (
                linear is not None
                and self.of(names[0].rpartition(".")[0], linear.weight, linear).codec is not None
            ):
                told = f"stores codes, but {names[0]} is the tensor {self.plan.aliases[names[0]]}, stored as that is"
                yield Problem(f"rules.{number}.format", self.rules[number].format.kind, told)


def _known(dtype: str) -> str:
    """The name of a dtype. Raises ValueError for one that no tensor has."""
    if dtype not in BITS:
        near = nearest(dtype, BITS)
        hint = "" if near is None else f"; did you mean {near!r}?"
        raise ValueError(f"{show(dtype)} is no dtype; there are {one_of(BITS)}{hint}")
    return dtype


def starred(name: str) -> str:
    """A name with a star for each number in it: `layers.*.mixer.q_a`."""
    return ".".join("*" if step.isdigit() else step for step in name.split("."))
