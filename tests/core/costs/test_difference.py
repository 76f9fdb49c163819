"""Two specs side by side: every change is told, ratios are of the numbers, and the factors multiply to the whole."""

import json
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.costs.difference import Difference
from composeformer.costs.pricing import Pricing
from composeformer.costs.printing import difference_markdown
from composeformer.errors import InputError
from composeformer.spec import Spec


@pytest.fixture(scope="module")
def headline() -> Difference:
    return Difference(Spec.load("deepseek-v3"), Spec.load("llama-3.1-405b"))


def test_llama_takes_11_6_times_the_hours_mostly_for_want_of_sparsity(headline: Difference) -> None:
    assert headline.hours == pytest.approx(11.58, rel=0.001)
    found = {factor.name: factor.value for factor in headline.factors}
    assert found == {
        "operations of a token": pytest.approx(10.10, rel=0.001),
        "tokens": pytest.approx(1.054, rel=0.001),
        "utilisation": pytest.approx(1.087, rel=0.001),
    }


priced = st.fixed_dictionaries(
    {"tokens": st.floats(1e6, 1e13), "utilisation": st.floats(0.05, 1.0)},
    optional={
        "hardware": st.sampled_from(["a100", "h100", "b200", "mi300x"]),
        "goodput": st.floats(0.5, 1.0),
        "context": st.integers(1, 512),
    },
)


@settings(max_examples=25, deadline=None)
@given(priced, priced)
def test_factors_multiply_to_the_ratio_of_hours(one: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = (Spec.load("tiny-llama").with_(cost=table) for table in (one, other))
    found = Difference(a, b)
    hours = [Pricing(spec).run.pretraining_hours for spec in (a, b)]
    assert prod(factor.value for factor in found.factors) == pytest.approx(hours[1] / hours[0], rel=1e-9)
    assert found.hours == pytest.approx(hours[1] / hours[0], rel=1e-9)
    back = Difference(b, a)
    assert back.hours == pytest.approx(1 / found.hours, rel=1e-9)


def test_a_spec_differs_in_nothing_from_itself() -> None:
    found = Difference(Spec.load("deepseek-v3"), Spec.load("deepseek-v3"))
    assert found.changes == ()
    assert all(pair.ratio in (None, 1.0) for pair in found.pairs)
    assert found.hours == 1.0


def test_what_is_added_removed_and_changed_is_told() -> None:
    plain = Spec.load("tiny-llama")
    changed = plain.with_({"mixer.attention.num_heads": 2, "mixer.attention.num_kv_heads": 1}).with_(
        predictor={"kind": "mtp"}, model={"max_position_embeddings": 256}
    )
    told = {(c.what, c.where): (c.first, c.second) for c in Difference(plain, changed).changes}
    assert told["changed", "mixer gqa: num_heads"] == ("4", "2")
    assert told["changed", "model: max_position_embeddings"] == ("512", "256")
    assert told["added", "predictor mtp"][0] == ""
    back = {(c.what, c.where) for c in Difference(changed, plain).changes}
    assert ("removed", "predictor mtp") in back


def test_ratios_are_of_the_numbers_and_of_no_others(headline: Difference) -> None:
    pairs = {(pair.section, pair.name): pair for pair in headline.pairs}
    total = pairs["parameters", "total"]
    assert total.ratio == 405853388800 / 671026404352
    assert pairs["parameters", "predictor"].ratio is None
    assert pairs["parameters", "predictor"].second is None


def test_without_a_price_there_are_no_factors() -> None:
    found = Difference(Spec.load("tiny-llama"), Spec.load("deepseek-v3"))
    assert found.factors == ()
    assert found.hours is None
    assert "times the device hours" not in difference_markdown(found)


@pytest.mark.parametrize("given", [{"gpu_hours": 1.0}, {"budget": 3.0, "rate": 3.0}])
def test_hours_that_can_not_have_trained_the_tokens_are_refused(given: dict[str, float]) -> None:
    spec = Spec.load("tiny-llama").with_(cost={"tokens": 1e15, **given})
    told = rf"cost.{next(iter(given))}: 1e\+15 tokens in 1 device hours are .*% of the bfloat16 peak"
    with pytest.raises(InputError, match=told):
        _ = Pricing(spec).utilisation


def test_the_command_prints_every_form(
    compose: Callable[..., tuple[int, str, str]], headline: Difference
) -> None:
    both = ("diff", "deepseek-v3", "llama-3.1-405b")
    code, out, _ = compose(*both)
    assert code == 0
    assert "11.57 times the hours" in out
    assert "10.103 x 1.054 x 1.086 = 11.57" in out
    code, out, _ = compose(*both, "--json")
    found = json.loads(out)
    assert (code, round(found["hours"], 2)) == (0, 11.57)
    assert {change["what"] for change in found["changes"]} == {"added", "removed", "changed"}
    assert compose(*both, "--markdown")[:2] == (0, difference_markdown(headline))
    code, out, err = compose("diff", "deepseek-v3", "no-such-spec")
    assert (code, out) == (2, "")
    assert "no-such-spec" in err
