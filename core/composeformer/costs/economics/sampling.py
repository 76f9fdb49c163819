"""Ranges of a result: each assumption drawn from its own, and each moved alone.

Draws are a Latin hypercube (McKay, Beckman and Conover, Technometrics 21, 239, 1979): every assumption visits each of n
equally likely strata once, in an order of its own, which takes far fewer draws than independent ones.
"""

from collections.abc import Callable, Iterable, Mapping
from math import exp, log
from random import Random
from statistics import NormalDist

import attrs

from composeformer.costs.economics.assumptions import Assumption

SAMPLES = 1000
_NORMAL = NormalDist()
_Z95 = _NORMAL.inv_cdf(0.95)
# Shares are drawn evenly.
SHARES = ("utilisation", "goodput", "interconnect", "calendar", "power", "restarts", "share")
TAIL = 0.05  # of the probability lies below a range, and as much above

Values = Mapping[str, float]
Result = Callable[[Values], Mapping[str, float]]


@attrs.frozen(kw_only=True)
class Quantiles:
    """Of a result: 5%, 50% and 95% lie below."""

    p5: float
    p50: float
    p95: float


@attrs.frozen(kw_only=True)
class Swing:
    """A result with one assumption at the ends of its range, the others at their values."""

    name: str
    low: float
    high: float
    at_low: float
    at_high: float

    @property
    def size(self) -> float:
        return abs(self.at_high - self.at_low)


def sampled(
    assumed: Mapping[str, Assumption], result: Result, *, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Quantiles]:
    """The quantiles of every result, over draws of all assumptions that have a range. The same for the same seed."""
    random = Random(seed)
    columns = {}
    for name, each in assumed.items():
        if each.low is None or each.high is None:
            continue
        strata = [(index + random.random()) / samples for index in range(samples)]
        random.shuffle(strata)
        columns[name] = _drawn(each, strata)
    values = {name: each.value for name, each in assumed.items()}
    found: dict[str, list[float]] = {}
    for draw in zip(*columns.values()) if columns else [()] * samples:
        for name, value in result({**values, **dict(zip(columns, draw))}).items():
            found.setdefault(name, []).append(value)
    return {name: _quantiles(sorted(values)) for name, values in found.items()}


def tornado(assumed: Mapping[str, Assumption], result: Callable[[Values], float]) -> list[Swing]:
    """What each assumption's range alone makes of a result, the widest first."""
    fixed = {name: each.value for name, each in assumed.items()}
    swings = []
    for name, each in assumed.items():
        if each.low is not None and each.high is not None:
            ends = [result(fixed | {name: end}) for end in (each.low, each.high)]
            swings.append(Swing(name=name, low=each.low, high=each.high, at_low=ends[0], at_high=ends[1]))
    return sorted(swings, key=lambda swing: -swing.size)


def _drawn(of: Assumption, strata: Iterable[float]) -> list[float]:
    """The values below which an assumption lies with these probabilities; never one that it can not have."""
    assert of.low is not None
    assert of.high is not None
    low, high = of.low, of.high
    if of.name not in SHARES:
        middle, half = (log(low) + log(high)) / 2, (log(high) - log(low)) / 2
        return [min(max(exp(middle + half * _normal(at) / _Z95), of.least), of.most) for at in strata]
    # As dense beyond the range as in it, as far as shares go; then the tail is denser.
    spare = TAIL / (1 - 2 * TAIL) * (high - low)
    least, most = max(low - spare, of.least), min(high + spare, of.most)

    def share(at: float) -> float:
        if at < TAIL:
            return least + at / TAIL * (low - least)
        if at > 1 - TAIL:
            return most - (1 - at) / TAIL * (most - high)
        return low + (at - TAIL) / (1 - 2 * TAIL) * (high - low)

    return [share(at) for at in strata]


def _normal(at: float) -> float:
    """The standard normal's quantile; a draw of exactly 0 is that of the least that is not."""
    return _NORMAL.inv_cdf(max(at, 1e-300))


def _quantiles(values: list[float]) -> Quantiles:
    last = len(values) - 1
    return Quantiles(
        p5=values[round(0.05 * last)], p50=values[round(0.5 * last)], p95=values[round(0.95 * last)]
    )
