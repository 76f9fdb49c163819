"""The same run in other years: cheaper as hardware becomes cheaper, and as the same quality takes less compute.

    cost(year) = cost 10^(-(hardware + algorithms) (year - base))

Both are rates in orders of magnitude a year, each with a range; the range of the cost takes both ends at once.
"""

from collections.abc import Mapping, Sequence

import attrs

from composeformer.costs.economics.assumptions import Assumption


@attrs.frozen(kw_only=True)
class Year:
    """USD of a run of that year: with cheaper hardware alone, and with better algorithms too; `low` and `high` are the
    latter's, at the ends of both ranges.
    """

    year: int
    hardware: float
    both: float
    low: float
    high: float


def trend(assumed: Mapping[str, Assumption], cost: float, base: int, years: Sequence[int]) -> list[Year]:
    """What a run that costs `cost` in the year `base` costs in others."""
    hardware, algorithms = assumed["hardware_progress"], assumed["algorithmic_progress"]

    def ends(of: Assumption) -> tuple[float, float]:
        return (of.value, of.value) if of.low is None or of.high is None else (of.low, of.high)

    slow, fast = (sum(pair) for pair in zip(ends(hardware), ends(algorithms)))
    found = []
    for year in years:
        past = year - base
        extremes = [cost * 10 ** (-rate * past) for rate in (slow, fast)]
        found.append(
            Year(
                year=year,
                hardware=cost * 10 ** (-hardware.value * past),
                both=cost * 10 ** (-(hardware.value + algorithms.value) * past),
                low=min(extremes),
                high=max(extremes),
            )
        )
    return found
