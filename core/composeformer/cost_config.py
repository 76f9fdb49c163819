"""`[cost]`: what a run is priced by. Where its values are from says `composeformer.costs.economics`."""

from collections.abc import Iterable

from composeformer.config import Config, config, facts_of, field, records
from composeformer.errors import Problem, nearest, one_of

# Products of all numbers of a price stay finite.
SMALLEST, LARGEST = 1e-30, 1e30


@config
class Range(Config):
    """Where a number of `[cost]` may lie, with a probability of 90%."""

    of: str = field(affects="execution", help="The name of a number of `[cost]`.")
    low: float = field(minimum=0.0, affects="execution", help="Below it lie 5%.")
    high: float = field(minimum=0.0, affects="execution", help="Above it lie 5%.")


@config
class CostConfig(Config):
    """`[cost]`: a training run's hardware, prices and people. It never changes a model's fingerprint."""

    hardware: str = field(
        "h100", affects="execution", help="A hardware profile: its name, or the path of a `.toml` file."
    )
    gpus: int = field(2048, minimum=1, unit="devices", affects="execution", help="Devices that train.")
    tokens: float | None = field(
        None, above=0.0, unit="tokens", affects="execution", help="Tokens of pre-training."
    )
    context: int | None = field(
        None,
        minimum=1,
        unit="tokens",
        affects="execution",
        help="Length of a sequence; 4096 or the model's longest.",
    )
    peak: str = field(
        "bfloat16", affects="execution", help="The dtype whose dense peak utilisation is measured against."
    )
    utilisation: float = field(
        0.4,
        above=0.0,
        maximum=1.0,
        affects="execution",
        help="Model FLOPs utilisation: causal, without a predictor, of the peak.",
    )
    goodput: float = field(
        1.0,
        above=0.0,
        maximum=1.0,
        affects="execution",
        help="Share of the hours that is not lost to failures.",
    )
    gpu_hours: float | None = field(
        None,
        above=0.0,
        unit="device hours",
        affects="execution",
        help="Of pre-training, where they are known.",
    )
    budget: float | None = field(
        None,
        above=0.0,
        unit="USD",
        affects="execution",
        help="Rent of all stages, where that is given: it buys the hours, and they train the tokens.",
    )
    other_gpu_hours: float = field(
        0.0,
        minimum=0.0,
        unit="device hours",
        affects="execution",
        help="Of what follows: longer context, alignment.",
    )
    rate: float = field(
        2.0, above=0.0, unit="USD per device hour", affects="execution", help="Rent of a device."
    )
    gpu_price: float = field(
        30000.0, above=0.0, unit="USD", affects="execution", help="Price of a device alone."
    )
    server_overhead: float = field(
        1.64, minimum=1.0, affects="execution", help="A server's price over that of the devices in it."
    )
    interconnect: float = field(
        0.19, minimum=0.0, maximum=0.9, affects="execution", help="Share of the network in a cluster's price."
    )
    hardware_progress: float = field(
        0.14,
        above=0.0,
        maximum=10.0,
        unit="orders of magnitude a year",
        affects="execution",
        help="Fall of the price of compute.",
    )
    life: float = field(
        4.0, above=0.0, unit="years", affects="execution", help="Of a device, for straight lines."
    )
    calendar: float = field(
        0.85,
        above=0.0,
        maximum=1.0,
        affects="execution",
        help="Share of its life that an owned device works.",
    )
    chip_to_server: float = field(
        1.82, minimum=1.0, affects="execution", help="A server's power over that of the devices in it."
    )
    power: float = field(
        0.75, above=0.0, maximum=1.0, affects="execution", help="Mean power over the largest that is rated."
    )
    pue: float = field(
        1.25, minimum=1.0, affects="execution", help="A data centre's power over that of its servers."
    )
    electricity: float = field(
        0.0771, above=0.0, unit="USD per kWh", affects="execution", help="Price of energy."
    )
    carbon: float = field(
        0.385,
        minimum=0.0,
        unit="kg CO2e per kWh",
        affects="execution",
        help="Emissions of the energy, as it is delivered to the facility.",
    )
    restarts: float = field(
        0.06,
        minimum=0.0,
        affects="execution",
        help="Compute of the final run that is done again, as its share.",
    )
    experiments: float = field(
        1.1,
        minimum=0.0,
        affects="execution",
        help="Compute of experiments and failed runs, over the final run's.",
    )
    headcount: float = field(126.0, minimum=0.0, unit="people", affects="execution", help="Who work on it.")
    salary: float = field(
        400000.0,
        minimum=0.0,
        unit="USD a year",
        affects="execution",
        help="Of one, with all that it costs to employ.",
    )
    years: float = field(0.55, above=0.0, unit="years", affects="execution", help="Of development.")
    share: float = field(
        1.0,
        above=0.0,
        maximum=1.0,
        affects="execution",
        help="Share of their time that goes into this model.",
    )
    algorithmic_progress: float = field(
        0.45,
        minimum=0.0,
        maximum=10.0,
        unit="orders of magnitude a year",
        affects="execution",
        help="Fall of the compute that the same quality takes.",
    )
    year: int | None = field(
        None,
        minimum=1990,
        maximum=2100,
        affects="execution",
        help="When it runs; when the hardware could be bought.",
    )
    fleet: int | None = field(
        None,
        minimum=1,
        unit="devices",
        affects="execution",
        help="Devices of the organisation; those that train.",
    )
    ranges: tuple[Range, ...] = records(
        Range,
        affects="execution",
        help="Where numbers may lie; they take the place of the ranges that are shipped.",
    )

    def problems(self) -> Iterable[Problem]:
        """What is wrong with the numbers, and with the ranges together."""
        facts = facts_of(CostConfig)
        for name, fact in facts.items():
            value = getattr(self, name)
            if fact.kind == "float" and value and not SMALLEST <= value <= LARGEST:
                yield Problem(name, value, f"must be between {SMALLEST:g} and {LARGEST:g}")
        names = numbers()
        for index, each in enumerate(self.ranges):
            if each.of not in names:
                told = f"must be a number of [cost]: {one_of(names)}"
                yield Problem(f"ranges.{index}.of", each.of, told, nearest(each.of, names))
            elif each.of in [other.of for other in self.ranges[:index]]:
                yield Problem(
                    f"ranges.{index}.of", each.of, "must have one range; it has another before this"
                )
            elif not 0 < each.low <= each.high:
                yield Problem(f"ranges.{index}.low", each.low, f"must be > 0 and <= high ({each.high:g})")
            else:
                fact = facts[each.of]
                least = max(SMALLEST, fact.minimum or 0.0)
                most = LARGEST if fact.maximum is None else fact.maximum
                if each.low < least:
                    yield Problem(f"ranges.{index}.low", each.low, f"must be >= {least:g}, as {each.of}")
                if each.high > most:
                    yield Problem(f"ranges.{index}.high", each.high, f"must be <= {most:g}, as {each.of}")


def numbers() -> tuple[str, ...]:
    """The names of the numbers that a price depends on, each of which may have a range."""
    facts = facts_of(CostConfig).values()
    return tuple(
        f.name for f in facts if f.kind == "float" and not f.optional and f.name != "other_gpu_hours"
    )
