"""A part or a strategy that ends the process, or draws what is no table, breaks its laws in words that name it."""

import sys
from typing import Any

import average_plugin as averages
import pytest
from hypothesis import strategies as st

from composeformer.contracts import Component, Implementation
from composeformer.testing import examine, find_law, subject

CAUSAL = find_law("mixer.causal")


class Ending(averages.Average):
    """It does to the process what `ends` says."""

    ends: Any = staticmethod(lambda: sys.exit(0))

    def forward(self, *args: Any, **more: Any) -> Any:
        self.ends()
        return super().forward(*args, **more)


class Fatal(BaseException):
    """What no `except Exception` sees."""


def _fatal() -> None:
    raise Fatal("of all things")


def _interrupt() -> None:
    raise KeyboardInterrupt


def found(**more: Any) -> Any:
    reference = Implementation("reference", f"{__name__}:Ending")
    component = Component("mixer", "ending", averages.AverageConfig, (reference,), **more)
    return examine(CAUSAL, subject("mixer", "ending", registry=averages.registry(component)), examples=5)


@pytest.mark.parametrize(
    ("ends", "told"),
    [(lambda: sys.exit(0), "raised SystemExit: 0"), (_fatal, "raised Fatal: of all things")],
)
def test_a_part_that_ends_the_process_breaks_the_law_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, ends: Any, told: str
) -> None:
    monkeypatch.setattr(Ending, "ends", staticmethod(ends))
    finding = found()
    assert (finding.verdict, finding.why) == ("broken", told)
    assert (finding.values["rows"], finding.values["tokens"]) == (1, 2)


def test_an_interrupt_is_the_users_and_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ending, "ends", staticmethod(_interrupt))
    with pytest.raises(KeyboardInterrupt):
        found()


def no_kind() -> Any:
    return st.just({})


def another() -> Any:
    return st.just({"kind": "gqa", "num_heads": 2})


def no_table() -> Any:
    return st.just([1])


def nothing() -> None:
    pass


def leaving() -> None:
    sys.exit(0)


constant = {"kind": "ending"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_kind", "draws kind = None; must be 'ending'"),
        ("another", "draws kind = \"gqa\"; must be 'ending'"),
        ("no_table", "draws [1]; must draw tables, with 'kind' = 'ending'"),
        ("nothing", "is NoneType; must be a strategy of hypothesis, or a function of one"),
        ("constant", "is dict; must be a strategy of hypothesis, or a function of one"),
        ("leaving", "raised SystemExit: 0"),
        ("absent", f"raised AttributeError: module {__name__!r} has no attribute 'absent'"),
    ],
)
def test_a_strategy_that_draws_no_tables_of_its_kind_is_named(name: str, told: str) -> None:
    finding = found(strategy=f"{__name__}:{name}")
    assert finding.verdict == "broken"
    assert finding.why == f"mixer ending: strategy '{__name__}:{name}': {told}"


bare = st.just({"kind": "ending"})


def test_a_strategy_may_be_named_itself_without_a_function_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ending, "ends", staticmethod(lambda: None))
    assert found(strategy=f"{__name__}:bare").held
