"""What trying laws on a part finds, and that a counterexample fails again."""

import importlib
import json
from pathlib import Path
from typing import Any

import average_plugin as averages
import pytest
from hypothesis.internal.conjecture import providers

from composeformer.errors import InputError
from composeformer.testing import LawBroken, certify, examine, find_law, laws_for, replay, subject, subjects
from composeformer.testing import certificate as certificates
from composeformer.testing.drawing import Drawn
from composeformer.testing.steady import steady

CAUSAL = find_law("mixer.causal")


@pytest.fixture(scope="module")
def registry() -> Any:
    return averages.registry(
        averages.component("average", averages.Average),
        averages.component("peeking", averages.Peeking),
        averages.component("raising", averages.Raising),
        averages.component("boasting", averages.Average, claims=("perpetual-motion",)),
    )


def tried(registry: Any, kind: str) -> Any:
    return subject("mixer", kind, registry=registry)


def test_a_right_part_holds_in_all_cases_within_its_bound(registry: Any) -> None:
    found = examine(CAUSAL, tried(registry, "average"), examples=12, seed=5)
    assert (found.verdict, found.held, found.cases, found.seed) == ("held", True, 12, 5)
    assert 0 <= found.error <= found.bound
    assert found.counterexample() == ""


def test_a_part_that_sees_ahead_is_told_with_its_smallest_case(registry: Any) -> None:
    found = examine(CAUSAL, tried(registry, "peeking"))
    assert found.verdict == "broken"
    assert "outputs before the changed token: differs by" in found.why
    assert found.error > found.bound > 0
    # It takes two tokens to see one ahead.
    assert (found.values["rows"], found.values["tokens"], found.values["changed"]) == (1, 2, 1)
    assert "[layers.mixer]" in found.spec


def test_cases_hang_on_the_seed_and_not_on_what_is_imported(
    registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hypothesis reads constants in modules of the user's, and tries them."""
    seen: list[Any] = []
    drawn = Drawn.__call__

    def noted(self: Drawn, label: str, strategy: Any) -> Any:
        seen.append(drawn(self, label, strategy))
        return seen[-1]

    monkeypatch.setattr(Drawn, "__call__", noted)

    def values() -> list[Any]:
        seen.clear()
        examine(CAUSAL, tried(registry, "average"), examples=60)
        return list(seen)

    before = values()
    constants = ", ".join(str(7919 * each) for each in range(1, 200))
    (tmp_path / "a_users_constants.py").write_text(f"TABLE = [{constants}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("a_users_constants")
    assert values() == before


def test_what_hypothesis_knows_is_put_back_by_whoever_leaves_last() -> None:
    before = providers._get_local_constants, providers.CONSTANTS_CACHE
    first, second = steady(), steady()
    first.__enter__()
    within = providers._get_local_constants
    second.__enter__()
    first.__exit__(None, None, None)
    assert providers._get_local_constants is within
    assert within is not before[0]
    second.__exit__(None, None, None)
    assert (providers._get_local_constants, providers.CONSTANTS_CACHE) == before


def test_a_counterexample_fails_in_the_same_words_again(registry: Any) -> None:
    found = examine(CAUSAL, tried(registry, "peeking"), seed=3)
    with pytest.raises(LawBroken) as broken:
        replay(found.law, found.kind, slot="mixer", values=found.values, registry=registry)
    assert str(broken.value) == found.why
    through_json = json.loads(json.dumps(found.values))
    with pytest.raises(LawBroken) as again:
        replay(found.law, found.kind, slot="mixer", values=through_json, registry=registry)
    assert str(again.value) == found.why


def test_a_counterexample_pasted_into_a_file_is_a_test_that_fails(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = examine(CAUSAL, tried(registry, "peeking"))
    monkeypatch.setattr(certificates, "subject", lambda *names: subject(*names[:3], registry=registry))
    pasted: dict[str, Any] = {}
    exec(found.counterexample(), pasted)
    with pytest.raises(LawBroken, match="outputs before the changed token"):
        pasted["test_mixer_causal_peeking"]()


def test_the_same_seed_finds_the_same_and_another_other_cases(registry: Any) -> None:
    first, same, other = (
        examine(CAUSAL, tried(registry, "average"), examples=6, seed=seed) for seed in (1, 1, 2)
    )
    assert (first.error, first.bound) == (same.error, same.bound)
    assert first.bound != other.bound


def test_an_error_that_a_part_raises_breaks_the_law_in_its_own_words(registry: Any) -> None:
    found = examine(CAUSAL, tried(registry, "raising"))
    assert found.verdict == "broken"
    assert found.why == "raised IndexError: no more than three tokens"
    assert found.values["tokens"] == 4


def test_a_claim_that_is_no_law_is_refused(registry: Any) -> None:
    component = registry.get("mixer", "boasting")
    with pytest.raises(InputError, match="mixer boasting: claims 'perpetual-motion', which is no law"):
        laws_for(component)
    with pytest.raises(InputError, match="boasting"):
        list(certify([tried(registry, "boasting")]))


def test_a_plugin_is_found_by_its_own_and_its_distributions_name(registry: Any) -> None:
    kinds = {"average", "peeking", "raising", "boasting"}
    for name in ("averages", "averages-dist", "averages-dist:averages"):
        assert {each.kind for each in subjects(name, registry)} == kinds
    assert kinds < {each.kind for each in subjects(registry=registry)}
    with pytest.raises(InputError, match=r"no plugin has this name.*did you mean 'averages'"):
        list(subjects("avrages", registry))


def test_parts_around_it_are_of_its_own_plugin_or_built_in(registry: Any) -> None:
    of_others = {"average", "peeking", "raising"}
    for each in subjects("moe", registry):
        assert not of_others & {part.kind for part in each.pool}
    assert of_others <= {part.kind for part in tried(registry, "average").pool}


def test_a_law_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"mixer.casual: no such law; did you mean 'mixer.causal'"):
        find_law("mixer.casual")
