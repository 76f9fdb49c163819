"""The language of expressions: what it computes is arithmetic, and nothing else can be said in it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composeformer.dialects.expressions import Expression, Template
from composeformer.errors import DialectError

NAMES = {"a": 3, "num_heads": 8, "l": 2, "kind": "yarn", "nothing": None, "tied": True}


def trees() -> st.SearchStrategy[tuple[str, int]]:
    """Text and value side by side, built from the leaves up."""
    leaves = st.one_of(
        st.integers(0, 50).map(lambda n: (str(n), n)),
        st.sampled_from(["a", "num_heads", "l"]).map(lambda n: (n, int(str(NAMES[n])))),
    )

    def grow(below: st.SearchStrategy[tuple[str, int]]) -> st.SearchStrategy[tuple[str, int]]:
        def join(left: tuple[str, int], right: tuple[str, int], op: str) -> tuple[str, int]:
            text = f"({left[0]} {op} {right[0]})"
            match op:
                case "+":
                    return text, left[1] + right[1]
                case "-":
                    return text, left[1] - right[1]
                case "*":
                    return text, left[1] * right[1]
                case _:
                    divisor = right[1] or 1
                    text = f"({left[0]} {op} {right[0] if right[1] else 1})"
                    return text, left[1] // divisor if op == "//" else left[1] % divisor

        return st.builds(join, below, below, st.sampled_from(["+", "-", "*", "//", "%"]))

    return st.recursive(leaves, grow, max_leaves=6)


@given(trees())
def test_arithmetic_is_that_of_integers(tree: tuple[str, int]) -> None:
    text, value = tree
    assert Expression(text).integer(NAMES) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("kind in ('linear', 'yarn')", True),
        ("kind != 'yarn' or not tied", False),
        ("0 < l < a and not nothing", True),
        ("-a + 1", -2),
        ("kind not in ('rope',)", True),
    ],
)
def test_conditions_compare_names(text: str, value: object) -> None:
    assert Expression(text).value(NAMES) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "a.real",
        "a ** a",
        "a / 2",
        "[a for a in b]",
        "lambda: 1",
        "f'{a}'",
        "a if l else 2",
        "(a := 3)",
        "1.5",
        "a[0]",
        "a +",
        "",
        "a\n+",
        "1 << 70",
        "~a",
        "b''",
        "1 " * 200,
    ],
)
def test_anything_else_is_refused_when_it_is_read(text: str) -> None:
    with pytest.raises(DialectError):
        Expression(text)


@pytest.mark.parametrize(
    "text", ["missing + 1", "a // (a - a)", "kind * 3", "nothing + 1", "a % 0", "kind < 3"]
)
def test_an_expression_without_a_value_is_an_error(text: str) -> None:
    with pytest.raises(DialectError):
        Expression(text).value(NAMES)


def test_numbers_stay_bounded() -> None:
    with pytest.raises(DialectError, match="beyond"):
        Expression(" * ".join(["999999999"] * 12)).value({})


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_template_counts_layers_on(layer: int, num_layers: int) -> None:
    names: dict[str, Any] = {"l": layer, "num_layers": num_layers}
    assert (
        Template("model.layers.{l+num_layers}.w{l}").fill(names)
        == f"model.layers.{layer + num_layers}.w{layer}"
    )


@pytest.mark.parametrize("text", ["a{l", "a}b", "../x{l}", "a b", "{}", "{l}/{l}", ""])
def test_a_template_is_a_tensor_name(text: str) -> None:
    with pytest.raises(DialectError):
        Template(text)
