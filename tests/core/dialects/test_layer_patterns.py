"""Layer patterns: every set of layers that a pattern can say is written so that it reads back as itself."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composeformer.dialects import patterns
from composeformer.dialects.lines import Pattern
from composeformer.dialects.parsing import pattern
from composeformer.errors import DialectError


def made(*choose: Any, **others: Any) -> Pattern:
    return pattern("p", {"ours": "mixer.window", "choose": list(choose), **others}, "here")


LIST = {"list": "types", "chosen": "near", "other": "far"}
LAYERS = st.lists(st.booleans(), min_size=1, max_size=24).map(tuple)


@given(LAYERS)
def test_lists_and_indices_say_any_layers(layers: tuple[bool, ...]) -> None:
    for each in (made(LIST), made({"indices": "at"}), made({"all_but": "not_at"})):
        assert patterns.read(each, patterns.write(each, layers), len(layers)) == layers


@given(st.integers(1, 24), st.integers(0, 24), st.integers(1, 9), st.integers(0, 3))
def test_what_a_rule_says_is_written_back(num_layers: int, first: int, every: int, offset: int) -> None:
    rules: list[tuple[Pattern, dict[str, Any]]] = [
        (made({"first": "n"}), {"n": first}),
        (made({"beyond": "n"}), {"n": first}),
        (made({"every": "n", "offset": offset}), {"n": every}),
        (made([{"beyond": "dense"}, {"every": "step"}]), {"dense": first, "step": every}),
        (made([{"all_but": "only"}, {"every": "step", "offset": 1}]), {"only": [0], "step": every}),
    ]
    for each, config in rules:
        layers = patterns.read(each, config, num_layers)
        assert patterns.read(each, patterns.write(each, layers), num_layers) == layers


def test_the_rules_choose_the_layers_they_name() -> None:
    def chosen(each: Pattern, **config: Any) -> list[int]:
        return [i for i, chosen in enumerate(patterns.read(each, config, 6)) if chosen]

    assert chosen(made({"first": "n"}), n=2) == [0, 1]
    assert chosen(made({"beyond": "n"}), n=2) == [2, 3, 4, 5]
    assert chosen(made({"every": "n"}), n=3) == [0, 3]
    assert chosen(made({"every": "n", "offset": 1}), n=3) == [2, 5]
    assert chosen(made({"indices": "n"}), n=[4, 1]) == [1, 4]
    assert chosen(made([{"beyond": "dense"}, {"every": "step"}]), dense=1, step=2) == [2, 4]


def test_the_first_stated_key_decides() -> None:
    each = made(LIST, {"beyond": "n", "default": 1})
    assert patterns.read(each, {"types": ["near", "far"], "n": 0}, 2) == (True, False)
    assert patterns.read(each, {"types": None}, 2) == (False, True)


def test_a_switch_that_is_off_chooses_none() -> None:
    each = made({"beyond": "n", "default": 0}, switch="on")
    assert patterns.read(each, {"on": True}, 2) == (True, True)
    assert patterns.read(each, {"on": False}, 2) == (False, False)
    assert patterns.read(each, {}, 2) == (False, False)
    assert patterns.write(each, (False, False))["on"] is False


@pytest.mark.parametrize(
    ("each", "config", "words"),
    [
        (made(LIST), {"types": ["near"]}, "2 layer types"),
        (made(LIST), {"types": ["near", "up"]}, '"up"'),
        (made(LIST), {}, "required"),
        (made({"first": "n"}), {"n": -1}, "count"),
        (made({"every": "n"}), {"n": 0}, "count"),
        (made({"every": "n"}), {"n": True}, "count"),
        (made({"indices": "n"}), {"n": [2]}, "below 2"),
        (made(LIST, switch="on"), {"on": 1, "types": ["far", "far"]}, "true or false"),
        (made(LIST, switch="on"), {"on": False, "types": ["near", "far"]}, "which is meant"),
    ],
)
def test_a_key_that_makes_no_sense_is_named(each: Pattern, config: dict[str, Any], words: str) -> None:
    with pytest.raises(DialectError, match=words):
        patterns.read(each, config, 2)


def test_layers_that_no_rule_says_are_refused() -> None:
    with pytest.raises(DialectError, match="fit no pattern"):
        patterns.write(made({"first": "n"}), (False, True, False))


def test_all_layers_or_none_by_a_switch() -> None:
    each = made({"all": True}, switch="on")
    for layers in ((True,) * 3, (False,) * 3):
        config = patterns.write(each, layers)
        assert config == {"on": layers[0]}
        assert patterns.read(each, config, 3) == layers
    assert each.keys == {"on"}
    with pytest.raises(DialectError, match="fit no pattern"):
        patterns.write(each, (False, True, True))
    with pytest.raises(DialectError, match="all must be true"):
        made({"all": 3})
