"""The two wider scopes: a model's development, and a year of the organisation. None is added to another, or to a run.

development = rent (1 + restarts) (1 + experiments) + headcount salary years share
a year      = fleet rate 8766 + headcount salary,  or owned;  and what the fleet costs to buy and to power

An owned fleet loses a year's value and draws a year's power whether it works or not.
"""

from collections.abc import Mapping

import attrs

from composeformer.costs.economics.run import HOURS_A_YEAR, Run, energy_rate, owned_rate


@attrs.frozen(kw_only=True)
class Development:
    """USD of a model's development. `final` is the final run with what had to be done again."""

    final: float
    experiments: float
    people: float

    @property
    def compute(self) -> float:
        return self.final + self.experiments

    @property
    def total(self) -> float:
        return self.compute + self.people


@attrs.frozen(kw_only=True)
class Fleet:
    """USD of a year of an organisation with `devices`; rented and owned are alternatives. `devices_price` buys devices
    alone, `cluster_price` servers and network too; the power bill is for what all of them draw.
    """

    devices: int
    rented: float
    owned: float
    people: float
    power_bill: float
    devices_price: float
    cluster_price: float


def development(of: Mapping[str, float], run: Run) -> Development:
    """Of a model whose final run this is."""
    final = run.rent * (1.0 + of["restarts"])
    people = of["headcount"] * of["salary"] * of["years"] * of["share"]
    return Development(final=final, experiments=final * of["experiments"], people=people)


def fleet(of: Mapping[str, float], devices: int, tdp: float) -> Fleet:
    """A year of so many devices of `tdp` watts, and of the people."""
    price = devices * of["gpu_price"]
    return Fleet(
        devices=devices,
        rented=devices * of["rate"] * HOURS_A_YEAR,
        owned=devices * owned_rate(of, tdp) * HOURS_A_YEAR,
        people=of["headcount"] * of["salary"],
        power_bill=devices * energy_rate(of, tdp) * HOURS_A_YEAR * of["electricity"],
        devices_price=price,
        cluster_price=price * of["server_overhead"] / (1.0 - of["interconnect"]),
    )
