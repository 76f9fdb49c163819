"""What a price depends on: every number of `[cost]`, with the range it may lie in, and where it is from.

A range holds the value with a probability of 90%; ends are quantiles of a lognormal distribution whose median is their
geometric mean, except of shares, which are uniform between them. No draw leaves what the number may be. A value that a
spec states has no range unless the spec states one in `[[cost.ranges]]`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from composeformer.config import facts_of
from composeformer.cost_config import LARGEST, SMALLEST, CostConfig, numbers

if TYPE_CHECKING:
    from composeformer.spec import Spec

EPOCH = "epoch-research/training-cost-trends at 263c40a, the code of arXiv 2405.21015"
JUDGED = "no source: a judgement"


@attrs.frozen(kw_only=True)
class Assumption:
    """A number that a price depends on. `low` and `high` hold it with a probability of 90%; None where it is exact.
    It can not be below `least` or above `most`.

    `read` says whether the source was read; a number that a spec states has the spec as its source.
    """

    name: str
    value: float
    unit: str
    help: str
    source: str
    read: bool
    low: float | None = None
    high: float | None = None
    least: float = SMALLEST
    most: float = LARGEST


# Ranges and sources of the values that are shipped.
SHIPPED: Mapping[str, tuple[float | None, float | None, str, bool]] = {
    "utilisation": (0.3, 0.45, JUDGED, False),
    "goodput": (None, None, "by definition, where no time is lost", True),
    "rate": (1.4, 3.0, "arXiv 2412.19437, table 1: 2 USD per H800 hour; the range is a judgement", True),
    "gpu_price": (15000.0, 60000.0, f"the article's 30,000 USD; a factor of 0.5 to 2: {EPOCH}", True),
    "server_overhead": (1.3, 2.1, EPOCH, True),
    "interconnect": (0.065, 0.242, f"{EPOCH}: a factor of 1.07 to 1.32", True),
    "hardware_progress": (0.1, 0.18, f"{EPOCH}; the range is a judgement", True),
    "life": (3.0, 5.0, JUDGED, False),
    "calendar": (0.7, 0.95, JUDGED, False),
    "chip_to_server": (None, None, EPOCH, True),
    "power": (0.6, 0.9, f"{EPOCH}; the range is a judgement", True),
    "pue": (
        1.1,
        1.4,
        f"{EPOCH}: 1.1 of the largest operators, 1.25 of others; the range is a judgement",
        True,
    ),
    "electricity": (0.05, 0.12, f"{EPOCH}: the mean of 2024; the range is a judgement", True),
    "carbon": (
        None,
        None,
        "0.41 to 0.42 of rated energy in the Llama 2 and 3.1 model cards, over a PUE of 1.1; that PUE is recalled",
        False,
    ),
    "restarts": (0.02, 0.15, JUDGED, False),
    "experiments": (
        0.3,
        4.0,
        "ablations that arXiv 2412.19437 discloses are 0.2; the article says 2 to 4; the range is a judgement",
        True,
    ),
    "headcount": (
        100.0,
        160.0,
        "arXiv 2412.19437 lists 150 research and engineering names; the range is a judgement",
        True,
    ),
    "salary": (200000.0, 800000.0, "the article", True),
    "years": (0.3, 1.0, JUDGED, False),
    "share": (None, None, "by definition, where all of it is attributed", True),
    "algorithmic_progress": (0.26, 0.72, "arXiv 2403.05812: compute halves every 5 to 14 months", False),
}


def assumptions(spec: "Spec") -> dict[str, Assumption]:
    """Every number that a spec's price depends on, in the order of `[cost]`: where tokens and hours are both stated,
    utilisation follows from them.
    """
    facts = facts_of(CostConfig)
    given = spec.cost.gpu_hours is not None or spec.cost.budget is not None
    followed = spec.cost.tokens is not None and given
    data = spec.document.data.get("cost")
    stated = data if isinstance(data, dict) else {}
    own = {each.of: each for each in spec.cost.ranges}
    found = {}
    for name in numbers():
        if name == "utilisation" and followed:
            continue
        low, high, source, read = SHIPPED[name]
        if name in stated:
            low, high, source, read = None, None, str(spec.document.source(("cost", name))), True
        if name in own:
            low, high = own[name].low, own[name].high
        found[name] = Assumption(
            name=name,
            value=float(getattr(spec.cost, name)),
            unit=facts[name].unit or "",
            help=facts[name].help,
            source=source,
            read=read,
            low=low,
            high=high,
            least=max(SMALLEST, facts[name].minimum or 0.0),
            most=LARGEST if (most := facts[name].maximum) is None else most,
        )
    return found
