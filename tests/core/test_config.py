"""One walker reads TOML against the fields: it coerces nothing and reports every problem at once."""

import math
from typing import Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composeformer.config import (
    LARGEST_INTEGER,
    Config,
    FieldFacts,
    check,
    config,
    describe,
    facts_of,
    field,
    part,
)
from composeformer.errors import Problem, SpecError


@config
class Every(Config):
    """A field of every type, all with defaults, so that a test states what it is about."""

    integer: int = field(default=8, minimum=1, maximum=64, multiple_of=4, unit="heads", help="An integer.")
    number: float = field(default=0.5, above=0, maximum=1)
    flag: bool = field(default=False, affects="execution")
    text: str = field(default="abc")
    choice: Literal["silu", "gelu", "relu"] = field(default="silu")
    chosen: int = field(default=2, choices=(1, 2, 4))
    maybe: int | None = field(default=None, minimum=0)
    integers: tuple[int, ...] = field(default=(), minimum=0)
    numbers: tuple[float, ...] | None = field(default=None)
    words: tuple[Literal["a", "b"], ...] = field(default=("a",))


@config
class Needy(Config):
    hidden_size: int = field(minimum=1, unit="features")
    eps: float = field(above=0)
    names: tuple[str, ...] = field()


@config
class Owner(Config):
    norm: object = part("norm", help="Normalises.")
    gate: object = part("ffn", optional=True, affects="training")


KINDS = {"integer": int, "float": float, "boolean": bool, "string": str}
scalars = st.one_of(
    st.booleans(), st.integers(-100, 100), st.floats(), st.text(max_size=5), st.integers(), st.just(2**5000),
    st.just(None), st.sampled_from(["silu", "gelu", "a", "1", "true"]),
)  # fmt: skip
values = st.one_of(scalars, st.lists(scalars | st.just([]), max_size=3), st.just({"a": 1}))
tables = st.dictionaries(st.sampled_from(list(facts_of(Every))), values, max_size=6)
real = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-LARGEST_INTEGER, LARGEST_INTEGER)
natural = st.integers(0, LARGEST_INTEGER)
right_values = {
    "integer": st.integers(1, 16).map(lambda n: 4 * n),
    "number": st.floats(1e-9, 1) | st.just(1),
    "flag": st.booleans(),
    "text": st.text(max_size=5),
    "choice": st.sampled_from(["silu", "gelu", "relu"]),
    "chosen": st.sampled_from([1, 2, 4]),
    "maybe": natural,
    "integers": st.lists(natural, max_size=3),
    "numbers": st.lists(real, max_size=3),
    "words": st.lists(st.sampled_from("ab"), max_size=3),
}
right_tables = st.fixed_dictionaries({}, optional=right_values)


def allowed(fact: FieldFacts, value: object) -> bool:
    """What a field accepts, said a second time and plainly."""
    if fact.many:
        element = attrs.evolve(fact, many=False)
        return isinstance(value, list | tuple) and all(allowed(element, each) for each in value)
    if fact.kind == "float" and type(value) is int:
        right_type = True
    else:
        right_type = fact.kind is not None and type(value) is KINDS[fact.kind]
    if not right_type or (fact.choices is not None and value not in fact.choices):
        return False
    if type(value) is int and not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        return False
    if isinstance(value, int | float) and type(value) is not bool:
        return (
            math.isfinite(value)
            and (fact.minimum is None or value >= fact.minimum)
            and (fact.above is None or value > fact.above)
            and (fact.maximum is None or value <= fact.maximum)
            and (fact.multiple_of is None or value % fact.multiple_of == 0)
        )
    return True


@given(tables)
def test_exactly_the_fields_with_a_wrong_value_are_reported(data):
    _, problems = check(Every, data)
    facts = facts_of(Every)
    wrong = {name for name, value in data.items() if not allowed(facts[name], value)}
    assert {problem.field.split(".")[0] for problem in problems} == wrong
    for problem in problems:
        assert "\n" not in str(problem)
        assert str(problem).startswith(problem.field)


@given(right_tables)
def test_nothing_is_coerced_but_an_integer_to_a_float(data):
    found, problems = check(Every, data)
    assert problems == []
    assert found.keys() == data.keys()
    for name, value in data.items():
        if isinstance(value, list):
            assert type(found[name]) is tuple
            pairs = list(zip(found[name], value, strict=True))
        else:
            pairs = [(found[name], value)]
        for got, given_value in pairs:
            assert got == given_value
            assert type(got) is (float if facts_of(Every)[name].kind == "float" else type(given_value))


@given(right_tables)
def test_what_passes_makes_a_hashable_config_that_keeps_it(data):
    found, problems = check(Every, data)
    assert problems == []
    made = Every(**found)
    assert made == Every(**found)
    assert hash(made) == hash(Every(**found))
    assert all(getattr(made, name) == value for name, value in found.items())
    # Reading what was made gives the same again.
    again, problems = check(
        Every, {name: value for name, value in attrs.asdict(made).items() if value is not None}
    )
    assert problems == []
    assert Every(**again) == made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("integer", "8"), ("integer", 8.0), ("integer", True), ("number", "0.5"), ("number", True),
        ("flag", 1), ("flag", "true"), ("flag", "no"), ("text", 3), ("text", False), ("integers", 3),
        ("integers", "12"), ("integers", ["1"]), ("chosen", True), ("chosen", 2.0), ("choice", ["silu"]),
        ("maybe", None), ("numbers", {}),
    ],
)  # fmt: skip
def test_a_near_miss_is_not_converted(name, value):
    _, (problem, *more) = check(Every, {name: value})
    assert not more
    assert problem.allowed.startswith("must be ")


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), scalars, max_size=6),
    st.sets(st.sampled_from(["kind", "use"])),
)
def test_every_unknown_key_and_every_missing_field_is_reported(data, reserved):
    names = set(facts_of(Needy))
    _, problems = check(Needy, {**dict.fromkeys(reserved, "x"), **data}, reserved=reserved)
    unknown = {problem.field for problem in problems if problem.allowed.startswith("unknown key")}
    missing = {problem.field for problem in problems if problem.allowed.startswith("is required")}
    assert unknown == set(data) - names - reserved
    assert missing == names - set(data)
    assert all(problem.found is None for problem in problems if problem.field in missing)


@pytest.mark.parametrize(
    ("cls", "data", "lines"),
    [
        (Needy, {"hiden_size": 8}, [
            "hiden_size = 8: unknown key; allowed: hidden_size, eps, names; did you mean 'hidden_size'?",
            "hidden_size: is required: an integer >= 1 (features)", "eps: is required: a number > 0",
            "names: is required: a string"]),
        (Needy, {"hidden_size": 0, "eps": 0, "names": ["a", 1, True]}, [
            "hidden_size = 0: must be >= 1", "eps = 0: must be > 0", "names.1 = 1: must be a string",
            "names.2 = true: must be a string"]),
        (Every, {"choice": "sillu"}, [
            "choice = \"sillu\": must be one of silu, gelu, relu; did you mean 'silu'?"]),
        (Every, {"words": ["a", "c"], "chosen": 3}, [
            "chosen = 3: must be one of 1, 2, 4", 'words.1 = "c": must be one of a, b']),
        (Every, {"integer": 68, "number": 1.5}, [
            "integer = 68: must be <= 64", "number = 1.5: must be <= 1"]),
        (Every, {"integer": 6, "maybe": -1}, [
            "integer = 6: must be a multiple of 4", "maybe = -1: must be >= 0"]),
        (Every, {"integers": 3}, ["integers = 3: must be a list, each element an integer >= 0"]),
        (Every, {"flag": "no"}, ['flag = "no": must be true or false']),
        (Every, {"numbers": [math.inf]}, ["numbers.0 = inf: must be finite"]),
        (Every, {"zzz": {"a": 1}}, [f"zzz: unknown key; allowed: {', '.join(facts_of(Every))}"]),
    ],
)  # fmt: skip
def test_problems_read_well(cls, data, lines):
    _, problems = check(cls, data)
    assert [str(problem) for problem in problems] == lines
    assert SpecError(problems).lines == tuple(lines)


@given(st.sampled_from(["minimum", "maximum", "above"]), st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_bounds_hold_at_the_bound(bound, limit, value):
    @config
    class Bounded(Config):
        size: int = field(**{bound: limit})

    inside = {"minimum": value >= limit, "maximum": value <= limit, "above": value > limit}[bound]
    assert (check(Bounded, {"size": value})[1] == []) == inside


@given(st.integers(), st.sampled_from(["wide", "real"]))
def test_integers_are_bounded_even_where_the_field_is_not(value, name):
    @config
    class Wide(Config):
        wide: int = field(default=0)
        real: float = field(default=0.0)

    for number in (value, value * 2**40, value * 10**400, value * 2**20000):
        _, problems = check(Wide, {name: number})
        assert (problems == []) == (abs(number) <= LARGEST_INTEGER)
        assert all(len(str(problem)) < 200 for problem in problems)


@given(st.text(max_size=6), st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5, unique=True))
def test_a_choice_is_refused_with_a_nearest_that_exists(found, choices):
    @config
    class Chosen(Config):
        name: str = field(choices=choices)

    _, problems = check(Chosen, {"name": found})
    assert (problems == []) == (found in choices)
    assert all(problem.nearest is None or problem.nearest in choices for problem in problems)


def test_parts_are_resolved_by_whoever_asks():
    seen = []

    def resolve(fact, found, steps):
        seen.append((fact.name, fact.slot, fact.optional, found))
        return f"<{found}>", [] if found else [Problem(fact.name, None, "there is none")]

    values, problems = check(Owner, {"norm": "rms"}, resolve)
    assert values == {"norm": "<rms>", "gate": "<None>"}
    assert [str(problem) for problem in problems] == ["gate: there is none"]
    assert seen == [("norm", "norm", False, "rms"), ("gate", "ffn", True, None)]
    with pytest.raises(TypeError, match="takes a part"):
        check(Owner, {})


def test_facts_are_what_the_field_states():
    facts = facts_of(Every)
    assert list(facts) == [attribute.name for attribute in attrs.fields(Every)]
    integer = facts["integer"]
    assert (integer.kind, integer.many, integer.optional, integer.required) == (
        "integer",
        False,
        False,
        False,
    )
    assert (integer.default, integer.minimum, integer.maximum, integer.multiple_of) == (8, 1, 64, 4)
    assert (integer.unit, integer.help, integer.affects) == ("heads", "An integer.", "function")
    assert (facts["number"].above, facts["flag"].affects) == (0, "execution")
    assert (facts["choice"].kind, facts["choice"].choices) == ("string", ("silu", "gelu", "relu"))
    assert (facts["numbers"].kind, facts["numbers"].many, facts["numbers"].optional) == ("float", True, True)
    assert (facts["words"].many, facts["words"].choices) == (True, ("a", "b"))
    assert all(fact.required for fact in facts_of(Needy).values())
    owner = facts_of(Owner)
    assert (owner["norm"].slot, owner["norm"].required, owner["norm"].kind) == ("norm", True, None)
    assert (owner["gate"].slot, owner["gate"].optional, owner["gate"].affects) == ("ffn", True, "training")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("integer", "an integer >= 1 <= 64, a multiple of 4 (heads)"),
        ("number", "a number > 0 <= 1"),
        ("flag", "true or false"),
        ("choice", "one of silu, gelu, relu"),
        ("maybe", "an integer >= 0"),
    ],
)
def test_a_field_is_described_in_words(name, words):
    assert describe(facts_of(Every)[name]) == words


def test_a_part_is_described_by_its_slot():
    assert describe(facts_of(Owner)["norm"]) == "a norm component"


@pytest.mark.parametrize(
    "hint",
    [
        list[int],
        dict[str, int],
        set[str],
        int | str,
        bytes,
        complex,
        object,
        list,
        tuple[list[int], ...],
        None,
    ],
)
def test_a_field_that_no_toml_value_can_fill_is_refused(hint):
    made = config(type("Odd", (Config,), {"__annotations__": {"odd": hint}, "odd": field()}))
    with pytest.raises(TypeError, match=r"Odd\.odd: .* is not int, float, bool, str"):
        facts_of(made)


def test_a_field_that_states_nothing_is_refused():
    @config
    class Bare(Config):
        bare: int = 3

    with pytest.raises(TypeError, match="not made with field"):
        facts_of(Bare)


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Every().integer = 3
    with pytest.raises(TypeError):
        Every(8)
    with pytest.raises(TypeError, match="hidden_size"):
        Needy()


def test_a_config_states_nothing_unless_it_overrides():
    made = Every()
    assert (*made.validate(None), *made.tensors(None), *made.cost(None, "train")) == ()


def test_inherited_fields_keep_their_facts():
    @config
    class More(Every):
        extra: int = field(default=1, minimum=1)

    assert list(facts_of(More)) == [*facts_of(Every), "extra"]
    assert facts_of(More)["integer"] == facts_of(Every)["integer"]
