"""Prices of training: inverses, scopes that are never added, ranges that are what they say, clear refusals."""

from collections.abc import Mapping
from math import exp, isfinite, log
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.config import facts_of
from composeformer.cost_config import CostConfig, numbers
from composeformer.costs.economics import (
    Assumption,
    assumptions,
    hours_of,
    sampled,
    tokens_of,
    tornado,
    trend,
)
from composeformer.costs.economics.assumptions import SHIPPED
from composeformer.costs.pricing import Pricing
from composeformer.errors import InputError, SpecError
from composeformer.spec import Spec

amounts = st.floats(1e-3, 1e15, allow_nan=False)
shares = st.floats(0.01, 1.0)


def priced(**cost: Any) -> Pricing:
    return Pricing(Spec.load("tiny-llama").with_(cost={"tokens": 1e9, "gpus": 8, **cost}))


@given(amounts, amounts, st.floats(1e9, 1e16), shares, shares)
def test_tokens_and_hours_are_inverses(
    tokens: float, per_token: float, peak: float, utilisation: float, goodput: float
) -> None:
    hours = hours_of(tokens * per_token, peak, utilisation, goodput)
    assert tokens_of(hours, per_token, peak, utilisation, goodput) == pytest.approx(tokens, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e6, 1e15), shares, shares)
def test_hours_that_tokens_take_train_those_tokens_at_that_utilisation(
    tokens: float, utilisation: float, goodput: float
) -> None:
    by_tokens = priced(tokens=tokens, utilisation=utilisation, goodput=goodput)
    table = {
        "gpu_hours": by_tokens.run.pretraining_hours,
        "utilisation": utilisation,
        "goodput": goodput,
        "gpus": 8,
    }
    by_hours = Pricing(Spec.load("tiny-llama").with_(cost=table))
    assert by_hours.tokens == pytest.approx(tokens, rel=1e-12)
    assert by_hours.run.rent == pytest.approx(by_tokens.run.rent, rel=1e-12)
    assert by_hours.utilisation.causal == pytest.approx(utilisation, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e2, 1e9), st.floats(0.1, 10.0), shares, st.just(0.0) | st.floats(0.1, 40.0))
def test_money_buys_hours_that_train_tokens_that_cost_that_money(
    budget: float, rate: float, utilisation: float, other: float
) -> None:
    table = {"rate": rate, "utilisation": utilisation, "other_gpu_hours": other, "gpus": 8}
    if budget / rate <= other:
        with pytest.raises(InputError, match=r"cost.budget = .*: buys no more than"):
            Pricing(Spec.load("tiny-llama").with_(cost={**table, "budget": budget}))
        return
    bought = Pricing(Spec.load("tiny-llama").with_(cost={**table, "budget": budget}))
    assert bought.run.rent == pytest.approx(budget, rel=1e-9)
    assert bought.run.hours == pytest.approx(budget / rate, rel=1e-9)
    back = Pricing(Spec.load("tiny-llama").with_(cost={**table, "tokens": bought.tokens}))
    assert back.run.rent == pytest.approx(budget, rel=1e-6)
    assert back.tokens == bought.tokens


def test_money_and_hours_are_proportional_and_so_are_days() -> None:
    one, other = priced(), priced(rate=4.0, gpus=16)
    assert other.run.rent == pytest.approx(2 * one.run.rent)
    assert other.run.days == pytest.approx(one.run.days / 2)
    assert one.run.rent == pytest.approx(one.run.hours * 2.0)


def test_no_scope_holds_another() -> None:
    """Owning is no addition to rent, and a fleet's year knows nothing of a run."""
    cheap, dear = priced(gpu_price=1.0), priced(gpu_price=1e9)
    assert cheap.run.rent == dear.run.rent
    assert cheap.development.total == dear.development.total
    assert cheap.fleet.rented == dear.fleet.rented
    assert priced(tokens=1e12).fleet == priced().fleet


def test_every_number_of_the_table_has_a_source_and_a_value_in_its_range() -> None:
    assert set(SHIPPED) == set(numbers())
    for each in assumptions(Spec.load("tiny-llama")).values():
        assert each.source, each.name
        assert each.help, each.name
        if each.low is not None and each.high is not None:
            assert each.low <= each.value <= each.high, each.name


def test_a_number_that_is_stated_has_the_spec_as_its_source_and_no_range() -> None:
    spec = Spec.load("tiny-llama", ["cost.rate=3", 'cost.ranges=[{of = "pue", low = 1.05, high = 1.3}]'])
    found = assumptions(spec)
    assert (found["rate"].value, found["rate"].source, found["rate"].low) == (3.0, "--set", None)
    assert (found["pue"].low, found["pue"].high) == (1.05, 1.3)


def assumed(name: str, low: float, high: float) -> Assumption:
    middle = exp((log(low) + log(high)) / 2)
    return Assumption(name=name, value=middle, unit="", help="", source="here", read=True, low=low, high=high)


@given(st.floats(0.1, 10.0), st.floats(1.01, 10.0), st.integers(0, 99))
def test_a_range_holds_nine_tenths_of_the_draws(low: float, ratio: float, seed: int) -> None:
    """One assumption alone: strata are equally likely, so quantiles are its own within one stratum."""
    high = low * ratio
    found = sampled(
        {"rate": assumed("rate", low, high)}, lambda of: {"it": of["rate"]}, samples=1000, seed=seed
    )["it"]
    step = ratio**0.005
    assert low / step <= found.p5 <= low * step
    assert high / step <= found.p95 <= high * step
    assert found.p50 == pytest.approx((low * high) ** 0.5, rel=step - 1)


@given(
    st.sampled_from(["utilisation", "interconnect", "calendar", "power", "goodput"]),
    st.floats(0.001, 0.9),
    st.floats(0.0, 1.0),
    st.integers(0, 99),
)
def test_a_range_of_a_share_holds_nine_tenths_and_no_draw_leaves_what_it_may_be(
    name: str, low: float, part: float, seed: int
) -> None:
    """Also where the range reaches to an end of what the share can be: a draw of 0 would divide by it."""
    fact = facts_of(CostConfig)[name]
    most = fact.maximum or 1.0
    low = min(low, most)
    high = low + part * (most - low)
    made = attrs.evolve(assumptions(Spec.load("tiny-llama"))[name], value=low, low=low, high=high)
    drawn: list[float] = []

    def kept(of: Mapping[str, float]) -> Mapping[str, float]:
        drawn.append(of[name])
        return {"it": of[name]}

    found = sampled({name: made}, kept, samples=1000, seed=seed)["it"]
    stratum = (high - low) / 900
    slack = stratum + 1e-12
    assert low - slack <= found.p5 <= low + slack
    assert high - slack <= found.p95 <= high + slack
    assert all((fact.minimum or 0.0) <= value <= most for value in drawn)
    assert fact.above is None or min(drawn) > fact.above


@given(st.floats(1.0, 3.0), st.floats(1.0, 3.0), st.integers(0, 99))
def test_no_draw_of_a_ratio_is_below_one(low: float, ratio: float, seed: int) -> None:
    made = attrs.evolve(assumptions(Spec.load("tiny-llama"))["pue"], low=low, high=low * ratio)
    smallest = []
    sampled({"pue": made}, lambda of: (smallest.append(of["pue"]), {"it": 0.0})[1], samples=200, seed=seed)
    assert min(smallest) >= 1.0


def test_an_owned_fleet_loses_value_and_draws_power_all_year() -> None:
    """A year of it holds the whole power bill, and is cheaper by nothing when devices stand idle."""
    run = priced(calendar=0.5)
    year, of = run.fleet, run.values
    assert year.owned == pytest.approx(8 * run.run.owned_rate * 8766)
    loss = year.cluster_price * of["hardware_progress"] * log(10)
    assert year.owned == pytest.approx(loss + year.power_bill)


def test_utilisation_is_no_assumption_where_tokens_and_hours_are_known() -> None:
    found = Pricing(Spec.load("llama-3.1-405b"))
    assert "utilisation" not in found.assumptions
    assert found.utilisation.causal == pytest.approx(0.358, abs=5e-4)
    assert "utilisation" in Pricing(Spec.load("deepseek-v3")).assumptions


def test_emissions_are_of_energy_at_the_facility_and_count_its_overhead_once() -> None:
    """The cards give 0.41 to 0.42 kg for a rated kWh, which holds a PUE already."""
    run = priced()
    assert run.run.carbon == pytest.approx(run.run.energy * run.values["carbon"])
    assert 0.41 / 1.1 - 0.01 <= run.values["carbon"] <= 0.4235 / 1.1 + 0.001


def test_the_same_seed_draws_the_same_and_another_nearly_the_same() -> None:
    run = priced()
    assert run.ranges(seed=3) == run.ranges(seed=3)
    one, other = run.ranges(seed=3), run.ranges(seed=4)
    assert one != other
    for name, found in one.items():
        assert other[name].p50 == pytest.approx(found.p50, rel=0.1)
        assert found.p5 < found.p50 < found.p95


def test_a_tornado_is_sorted_and_moves_one_assumption_at_a_time() -> None:
    made = {"rate": assumed("rate", 1.0, 4.0), "pue": assumed("pue", 1.0, 1.1)}
    swings = tornado(made, lambda of: of["rate"] * 10 + of["pue"])
    assert [swing.name for swing in swings] == ["rate", "pue"]
    assert swings[0].size == pytest.approx(30.0)
    assert swings[1].size == pytest.approx(0.1)


def test_a_run_becomes_cheaper_by_both_rates_and_its_own_year_is_its_price() -> None:
    made = {name: assumed(name, 0.1, 0.4) for name in ("hardware_progress", "algorithmic_progress")}
    before, now, after = trend(made, 100.0, 2024, (2023, 2024, 2025))
    assert (now.hardware, now.both, now.low, now.high) == (100.0, 100.0, 100.0, 100.0)
    assert after.hardware == pytest.approx(100 * 10**-0.2)
    assert after.both == pytest.approx(100 * 10**-0.4)
    assert (after.low, after.high) == (pytest.approx(100 * 10**-0.8), pytest.approx(100 * 10**-0.2))
    assert before.both == pytest.approx(100 * 10**0.4)
    assert before.low < before.both < before.high


WRONG: dict[str, tuple[list[str], str]] = {
    "no hardware": (["cost.hardware=h80"], "hardware h80: must be a path or one of a100"),
    "zero devices": (["cost.gpus=0"], "cost.gpus = 0: must be >= 1"),
    "negative tokens": (["cost.tokens=-1"], "cost.tokens = -1: must be > 0"),
    "more than all of the peak": (["cost.utilisation=1.1"], "cost.utilisation = 1.1: must be <= 1"),
    "a peak that there is not": (["cost.peak=fp4"], "cost.peak = fp4: hardware h100 has no peak of it"),
    "a context beyond the model's": (
        ["cost.context=1000000"],
        "cost.context = 1000000: must be <= max_position",
    ),
    "a range of nothing": (['cost.ranges=[{of="rat", low=1, high=2}]'], "did you mean 'rate'"),
    "a range upside down": (
        ['cost.ranges=[{of="rate", low=2, high=1}]'],
        "ranges.0.low = 2.0: must be > 0 and <= high",
    ),
    "a second range": (
        ['cost.ranges=[{of="rate", low=1, high=2}, {of="rate", low=1, high=3}]'],
        'ranges.1.of = "rate": must have one range',
    ),
    "a range of more than all": (
        ['cost.ranges=[{of="utilisation", low=0.5, high=1.2}]'],
        "ranges.0.high = 1.2: must be <= 1, as utilisation",
    ),
    "a range of less than there can be": (
        ['cost.ranges=[{of="pue", low=0.9, high=1.2}]'],
        "ranges.0.low = 0.9: must be >= 1, as pue",
    ),
    "a range to where nothing is left": (
        ['cost.ranges=[{of="interconnect", low=0.5, high=1.0}]'],
        "ranges.0.high = 1.0: must be <= 0.9",
    ),
    "a range of all numbers": (
        ['cost.ranges=[{of="years", low=1, high=1e300}]'],
        "ranges.0.high = 1e+300: must be <= 1e+30",
    ),
    "more tokens than any number": (
        ["cost.tokens=1e300"],
        "cost.tokens = 1e+300: must be between 1e-30 and 1e+30",
    ),
    "hardly any of the peak": (["cost.utilisation=1e-320"], "must be between 1e-30 and 1e+30"),
    "a price of no size": (["cost.electricity=1e308"], "must be between 1e-30 and 1e+30"),
    "progress beyond measure": (["cost.hardware_progress=1e9"], "must be <= 10"),
    "shares beyond one": (["cost.calendar=0"], "cost.calendar = 0: must be > 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_can_not_be_is_one_clear_error(name: str) -> None:
    settings, told = WRONG[name]
    with pytest.raises((InputError, SpecError)) as refused:
        Pricing(Spec.load("tiny-llama", ["cost.tokens=1e9", *settings]))
    assert told in str(refused.value)
    assert len(refused.value.lines) == 1


def test_a_price_needs_tokens_or_hours() -> None:
    with pytest.raises(InputError, match=r"cost.tokens: must be stated, or cost.gpu_hours, or cost.budget"):
        Pricing(Spec.load("tiny-llama"))
    with pytest.raises(
        InputError, match=r"cost.budget: buys the hours of the run, and cost.gpu_hours states them"
    ):
        Pricing(Spec.load("tiny-llama").with_(cost={"gpu_hours": 1.0, "budget": 1.0}))


def test_the_table_is_of_a_run_and_no_part_of_what_a_model_is() -> None:
    plain = Spec.load("tiny-llama")
    assert plain.with_(cost={"rate": 9.0, "tokens": 1e12}).fingerprint == plain.fingerprint
    assert CostConfig().rate == plain.cost.rate


EXTREMES = sorted(set(numbers()) - {"hardware_progress", "algorithmic_progress"})


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(EXTREMES), st.booleans(), max_size=8), st.booleans())
def test_every_price_that_is_not_refused_is_a_finite_number(ends: dict[str, bool], many: bool) -> None:
    """Numbers at the ends of what each may be, several at once."""
    table = {}
    for name, high in ends.items():
        fact = facts_of(CostConfig)[name]
        low = 1e-30 if fact.above is not None else fact.minimum or 0.0
        table[name] = (1e30 if fact.maximum is None else fact.maximum) if high else low
    found = priced(**table, tokens=1e30 if many else 1e-30)
    for value in (*attrs.asdict(found.run).values(), *attrs.asdict(found.fleet).values()):
        assert isfinite(value)
    assert all(isfinite(value) for each in found.ranges().values() for value in attrs.astuple(each))
    assert all(isfinite(swing.at_low) and isfinite(swing.at_high) for swing in found.tornado())
    assert isfinite(found.utilisation.causal)
