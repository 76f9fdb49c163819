"""Two specs side by side: what each has that the other lacks, every number of both, and why one costs more.

The device hours of two runs are apart by a product of factors, each a ratio of the second to the first:

    hours = operations of a token x tokens / (utilisation x peak x goodput)
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from typing import Any, Literal

import attrs

from composeformer.config import Config, facts_of, plain
from composeformer.contracts import LayerParts, Part
from composeformer.costs.pricing import Pricing
from composeformer.costs.quantities import Quantity
from composeformer.costs.report import Report
from composeformer.spec import Spec

What = Literal["added", "removed", "changed"]


@attrs.frozen(kw_only=True)
class Change:
    """A part or a field of the second that is not so in the first; `first` and `second` are what they have there."""

    what: What
    where: str
    first: str
    second: str


@attrs.frozen(kw_only=True)
class Factor:
    """A ratio of the second to the first; above one it makes the second dearer."""

    name: str
    value: float
    told: str


@attrs.frozen(kw_only=True)
class Pair:
    """One number of both; None where only the other has it."""

    section: str
    name: str
    first: Quantity | None
    second: Quantity | None

    @property
    def ratio(self) -> float | None:
        """The second over the first, where both have a number and the first is not zero."""
        values = [None if q is None else q.value for q in (self.first, self.second)]
        if values[0] is None or values[1] is None or not values[0]:
            return None
        return values[1] / values[0]


class Difference:
    """The second spec against the first."""

    def __init__(self, first: Spec, second: Spec, *, context: int | None = None) -> None:
        self.first, self.second = Report(first, context=context), Report(second, context=context)

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """What is added, removed and changed, slot by slot."""
        return tuple(_changes(self.first.spec, self.second.spec))

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Every number that either has."""
        ours, theirs = self.first.sections, self.second.sections
        found = []
        for title in dict.fromkeys((*ours, *theirs)):
            a, b = ours.get(title, {}), theirs.get(title, {})
            found += [
                Pair(section=title, name=name, first=a.get(name), second=b.get(name))
                for name in dict.fromkeys((*a, *b))
            ]
        return tuple(found)

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        """Why the second's pre-training takes more device hours; empty where either is not priced."""
        if not (self.first.is_priced and self.second.is_priced):
            return ()
        return tuple(_factors(self.first.pricing, self.second.pricing))

    @property
    def hours(self) -> float | None:
        """The ratio of device hours of pre-training, which is the product of the factors."""
        return prod(each.value for each in self.factors) if self.factors else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "first": {"name": self.first.spec.name, "fingerprint": self.first.spec.fingerprint},
            "second": {"name": self.second.spec.name, "fingerprint": self.second.spec.fingerprint},
            "changes": [attrs.asdict(each) for each in self.changes],
            "numbers": [
                {
                    "section": each.section,
                    "name": each.name,
                    "first": None if each.first is None else each.first.to_dict(),
                    "second": None if each.second is None else each.second.to_dict(),
                    "ratio": each.ratio,
                }
                for each in self.pairs
            ],
            "hours": self.hours,
            "factors": [attrs.asdict(each) for each in self.factors],
        }


def _factors(a: Pricing, b: Pricing) -> Iterator[Factor]:
    contexts = [each.counts.flops_per_token.context for each in (a, b)]
    at = f"training, causal, at {contexts[0]:,} and {contexts[1]:,} tokens"
    yield Factor(name="operations of a token", value=b.per_token / a.per_token, told=at)
    yield Factor(name="tokens", value=b.tokens / a.tokens, told="of pre-training")
    told = "model FLOPs utilisation, the first's over the second's"
    yield Factor(name="utilisation", value=a.utilisation.causal / b.utilisation.causal, told=told)
    if a.peak.value != b.peak.value:
        told = f"of a device: {a.hardware.name}'s over {b.hardware.name}'s"
        yield Factor(name="peak", value=a.peak.value / b.peak.value, told=told)
    if a.values["goodput"] != b.values["goodput"]:
        told = "share of hours that count, the first's over the second's"
        yield Factor(name="goodput", value=a.values["goodput"] / b.values["goodput"], told=told)


def _changes(a: Spec, b: Spec) -> Iterator[Change]:
    yield from _fields("model", _flat(a.model), _flat(b.model))
    if len(a.layers) != len(b.layers):
        yield Change(what="changed", where="layers", first=str(len(a.layers)), second=str(len(b.layers)))
    ours, theirs = _parts(a), _parts(b)
    for slot in dict.fromkeys(slot for slot, _ in (*ours, *theirs)):
        kinds = dict.fromkeys(kind for s, kind in (*ours, *theirs) if s == slot)
        for kind in kinds:
            one, other = ours.get((slot, kind)), theirs.get((slot, kind))
            where = f"{slot} {kind}"
            if one is None and other is not None:
                yield Change(what="added", where=where, first="", second=_told(other))
            elif other is None and one is not None:
                yield Change(what="removed", where=where, first=_told(one), second="")
            elif one is not None and other is not None:
                yield from _fields(where, one, other)


def _parts(spec: Spec) -> dict[tuple[str, str], dict[str, str]]:
    """Each sort of part, by slot and kind: its fields, all values that a field has anywhere, and in how many places."""
    found: dict[tuple[str, str], dict[str, dict[str, None]]] = {}
    places: dict[tuple[str, str], int] = {}
    for node in spec.plan.nodes():
        key = node.slot, node.part.kind
        places[key] = places.get(key, 0) + 1
        fields = found.setdefault(key, {})
        for name, value in _flat(node.part.config).items():
            fields.setdefault(name, {})[value] = None
    for slot in ("precision", "comm"):
        part = spec.singles.get(slot)
        if part is not None and slot in spec.document.data:
            found[slot, part.kind] = {name: {value: None} for name, value in _flat(part.config).items()}
            places[slot, part.kind] = 1
    return {
        key: {"places": str(places[key]), **{name: ", ".join(values) for name, values in fields.items()}}
        for key, fields in found.items()
    }


def _flat(config: Config) -> dict[str, str]:
    """The fields of a config in words; parts in it are told where they are built."""
    found = {}
    for name in facts_of(type(config)):
        value = getattr(config, name)
        if value is None or isinstance(value, Part | LayerParts):
            continue
        shown = plain(value)
        found[name] = str(shown).lower() if isinstance(shown, bool) else str(shown)
    return found


def _fields(where: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Change]:
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) != b.get(name):
            first, second = a.get(name, "absent"), b.get(name, "absent")
            yield Change(what="changed", where=f"{where}: {name}", first=first, second=second)


def _told(fields: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in fields.items())
