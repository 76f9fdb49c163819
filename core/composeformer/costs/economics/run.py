"""One training run: operations to hours to money and energy, and back.

    operations = tokens F            F: training operations of a token, causal, without a predictor
    hours      = operations / (peak utilisation 3600) / goodput
    rent       = hours rate
    energy     = hours TDP chip_to_server power PUE

Owning is an alternative to renting, never added to it: a device loses value as compute becomes cheaper, by k ln 10 of
its price a year (arXiv 2405.21015, section 2.3), or along a straight line over its life.
"""

from collections.abc import Mapping
from math import log

import attrs

HOURS_A_YEAR = 8766.0
HOURS_A_DAY = 24.0


@attrs.frozen(kw_only=True)
class Run:
    """What a run takes. Money in USD, energy in kWh, carbon in kg CO2e; `owned` and `straight` are alternatives to
    `rent`. `pretraining_hours` are of the tokens, `hours` of all stages.
    """

    operations: float
    pretraining_hours: float
    hours: float
    days: float
    rent: float
    owned_rate: float
    owned: float
    straight_rate: float
    straight: float
    energy: float
    energy_cost: float
    carbon: float


def hours_of(operations: float, peak: float, utilisation: float, goodput: float = 1.0) -> float:
    """Device hours of so many operations; `peak` in operations a second."""
    return operations / (peak * utilisation * 3600.0) / goodput


def tokens_of(hours: float, per_token: float, peak: float, utilisation: float, goodput: float = 1.0) -> float:
    """The inverse: tokens that so many device hours train, at `per_token` operations."""
    return hours * goodput * peak * utilisation * 3600.0 / per_token


def energy_rate(of: Mapping[str, float], tdp: float) -> float:
    """kWh of a device hour at the facility; `tdp` in watts."""
    return tdp / 1000.0 * of["chip_to_server"] * of["power"] * of["pue"]


def owned_rate(of: Mapping[str, float], tdp: float) -> float:
    """USD of a device hour of an owned cluster whose value falls with the price of compute, energy included."""
    cluster = of["gpu_price"] * of["server_overhead"] / (1.0 - of["interconnect"])
    return (
        cluster * of["hardware_progress"] * log(10.0) / HOURS_A_YEAR
        + energy_rate(of, tdp) * of["electricity"]
    )


def straight_rate(of: Mapping[str, float], tdp: float) -> float:
    """USD of a device hour of an owned cluster that is written off along a straight line, energy included."""
    cluster = of["gpu_price"] * of["server_overhead"] / (1.0 - of["interconnect"])
    return cluster / (of["life"] * HOURS_A_YEAR * of["calendar"]) + energy_rate(of, tdp) * of["electricity"]


def price(
    of: Mapping[str, float],
    *,
    pretraining_hours: float,
    other_hours: float,
    operations: float,
    gpus: int,
    tdp: float,
) -> Run:
    """A run of known hours under assumptions, by name."""
    hours = pretraining_hours + other_hours
    energy = hours * energy_rate(of, tdp)
    own, line = owned_rate(of, tdp), straight_rate(of, tdp)
    return Run(
        operations=operations,
        pretraining_hours=pretraining_hours,
        hours=hours,
        days=hours / gpus / HOURS_A_DAY,
        rent=hours * of["rate"],
        owned_rate=own,
        owned=hours * own,
        straight_rate=line,
        straight=hours * line,
        energy=energy,
        energy_cost=energy * of["electricity"],
        carbon=energy * of["carbon"],
    )
