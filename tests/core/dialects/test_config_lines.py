"""Lines of `[config]`: what each says is read as itself, written back, and refused where it makes no sense."""

import logging
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from composeformer.dialects import family, reading, writing
from composeformer.dialects.family import Family
from composeformer.dialects.reading import Values
from composeformer.errors import DialectError


def made(keys: dict[str, Any], **others: Any) -> Family:
    document = {
        "format": 1,
        "name": "odd",
        "source": "huggingface",
        "model_type": "odd",
        "architectures": ["Odd"],
        "config": {"depth": {"ours": "num_layers", "default": 3}} | keys,
        "tensors": [],
    }
    return family.parse(tomli_w.dumps(document | others), "odd.toml")


def names(
    odd: Family, config: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
    return reading.read(odd, config, shapes or {}).names


def written(odd: Family, **found: Any) -> dict[str, Any]:
    return writing.config(odd, Values(names=dict.fromkeys(odd.names) | {"num_layers": 3} | found))


def refused(odd: Family, config: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(DialectError) as caught:
        names(odd, config)
    return caught.value.lines


def test_words_may_be_true_and_false() -> None:
    odd = made({"turn": {"ours": "mixer.layout", "values": {"true": "interleaved", "false": "half-split"}}})
    for theirs, ours in ((True, "interleaved"), (False, "half-split")):
        assert names(odd, {"turn": theirs})["layout"] == ours
        assert written(odd, layout=ours)["turn"] is theirs
    others: tuple[Any, ...] = ("true", 1, 0, [], 1.0)
    for wrong in others:
        assert refused(odd, {"turn": wrong})[0].endswith("must be one of true, false")


@given(st.integers(0, 5))
def test_a_value_of_theirs_may_mean_that_there_is_none(count: int) -> None:
    odd = made({"further": {"ours": "predictor.ahead", "default": 0, "absent": 0}})
    assert names(odd, {"further": count})["ahead"] == (count or None)
    assert written(odd, ahead=count or None)["further"] == count
    assert names(odd, {})["ahead"] is None
    assert names(odd, {"further": False})["ahead"] is False


def test_a_key_has_other_names_which_must_agree() -> None:
    odd = made({"experts": {"ours": "ffn.num_experts", "default": 8, "also": ["local_experts", "n"]}})
    for config in ({"experts": 4}, {"local_experts": 4}, {"n": 4}, {"experts": 4, "n": 4}):
        assert names(odd, config)["num_experts"] == 4
    assert names(odd, {})["num_experts"] == 8
    assert written(odd, num_experts=4) == {"depth": 3, "experts": 4}
    assert refused(odd, {"experts": 4, "n": 5}) == ("experts = 4 and n = 5: which is meant?",)


def test_a_key_may_be_refused_with_its_reason() -> None:
    odd = made({"codes": {"refuse": "weights are codes"}})
    assert refused(odd, {"codes": {"bits": 4}}) == ("codes = {'bits': 4}: weights are codes",)
    assert names(odd, {"codes": None}) == names(odd, {}) == {"num_layers": 3}
    assert "codes" not in written(odd)


def test_a_key_may_only_name_a_choice_on_which_others_hang() -> None:
    choices = [{"value": "greedy", "when": "num_groups == 1"}, {"value": "limited"}]
    odd = made(
        {
            "method": {"name": "method", "choices": choices, "default": "greedy"},
            "groups": {"ours": "ffn.num_groups", "null": "= 1", "default": 1, "when": "method != 'greedy'"},
        }
    )
    assert names(odd, {"method": "limited", "groups": 4}) == {
        "num_layers": 3,
        "method": "limited",
        "num_groups": 4,
    }
    assert names(odd, {})["method"] == "greedy"
    assert refused(odd, {"method": "other"}) == ('method = "other": must be one of "greedy", "limited"',)
    assert written(odd, method="limited", num_groups=4) == {"depth": 3, "method": "limited", "groups": 4}
    assert written(odd, method="greedy", num_groups=1) == {"depth": 3, "method": "greedy"}


STORED = {"ours": "predictor.ahead", "default": 0, "absent": 0, "stored": "layers.{num_layers}.w"}


def test_what_is_announced_but_not_stored_is_absent_and_told(caplog: pytest.LogCaptureFixture) -> None:
    odd = made({"further": STORED})
    assert names(odd, {"further": 2})["ahead"] == 2  # nothing is known of the tensors
    assert names(odd, {"further": 2}, {"layers.3.w": (1,)})["ahead"] == 2
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert names(odd, {"further": 2}, {"layers.2.w": (1,)})["ahead"] is None
    assert [r.getMessage() for r in caplog.records] == [
        "further = 2, but nothing of layers.3.w is stored: read as 0"
    ]


def test_what_can_not_be_together_is_refused_with_the_reason() -> None:
    even = {"ours": "ffn.kind", "equals": "moe", "choose": [{"first": "sparse", "default": 1}]}
    rule = {"when": "ahead != None and not chosen", "layer": "num_layers - 1", "why": "not so"}
    odd = made({"further": STORED}, patterns={"chosen": even}, refuse=[rule])
    assert refused(odd, {"further": 1, "sparse": 2}) == ("not so",)
    assert names(odd, {"further": 1, "sparse": 3})["ahead"] == 1
    assert names(odd, {"further": 0, "sparse": 2})["ahead"] is None


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ({"choices": ["a"]}, "must be a table"),
        ({"choices": "a", "name": "x"}, "choices must be a list"),
        ({"choices": [{"value": "a"}]}, "go with a `name`"),
        ({"choices": [{"value": "a"}], "name": "x", "ours": "mixer.x"}, "fill no path"),
        ({"choices": [{"value": "a", "when": "strange"}], "name": "x"}, "uses strange"),
        ({"ours": "mixer.x", "stored": "w"}, "`stored` needs `absent`"),
        ({"ours": "mixer.x", "absent": 0, "stored": "w{q}"}, "uses q"),
        ({"ours": "mixer.x", "also": 3}, "must be text"),
        ({"refuse": ""}, "must be text"),
    ],
)
def test_a_slip_is_told_in_one_line_with_its_place(key: dict[str, Any], words: str) -> None:
    with pytest.raises(DialectError, match=words) as caught:
        made({"k": key})
    assert str(caught.value).startswith("odd.toml")
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (3, "refuse must be a list"),
        ([{"why": "x"}], "needs `when`"),
        ([{"when": "num_layers == 1"}], "needs `why`"),
        ([{"when": "q == 1", "why": "x"}], "uses q"),
    ],
)
def test_a_slip_in_a_refusal_is_told_with_its_place(rules: Any, words: str) -> None:
    with pytest.raises(DialectError, match=words) as caught:
        made({}, refuse=rules)
    assert str(caught.value).startswith("odd.toml")
