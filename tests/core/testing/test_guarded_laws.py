"""A part that ends its process, crashes it or never returns breaks the law that found it, and no other."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import average_plugin as averages
import pytest

from composeformer.contracts import Implementation
from composeformer.errors import InputError
from composeformer.testing import examine, find_law, subject
from composeformer.testing import guard as guards
from composeformer.testing.certificate import trials
from composeformer.testing.guard import CLOSED, guarded

CAUSAL = find_law("mixer.causal")
LONG = 5


class Leaving(averages.Average):
    """On more than a few tokens it does to the process what `leaves` says."""

    leaves: Callable[[], Any] = staticmethod(lambda: None)

    def forward(self, x: Any, *args: Any, **more: Any) -> Any:
        if x.shape[1] >= LONG:
            self.leaves()
        return super().forward(x, *args, **more)


def crashing() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def sleeping() -> None:
    while True:
        time.sleep(60)


def leaving_another_behind() -> None:
    """The process ends, and one that it made keeps all that it has open."""
    if os.fork() == 0:
        sleeping()
    os._exit(3)


def leaving_its_group() -> None:
    if os.fork() == 0:
        sleeping()
    os.setpgid(0, os.getpgid(os.getppid()))
    sleeping()


def closing() -> None:
    os.closerange(3, 1024)


def closing_and_sleeping() -> None:
    closing()
    sleeping()


CLOSES = "closed files of the process that it had not opened"


def place(function: Any, line: int) -> str:
    """What is told of a line of a function of this file."""
    code = function.__code__
    return f"it stood at testing/{Path(__file__).name}:{code.co_firstlineno + line} in {code.co_name}"


@pytest.fixture
def tried() -> Any:
    reference = Implementation("reference", f"{__name__}:Leaving")
    registry = averages.registry(
        averages.Component("mixer", "leaving", averages.AverageConfig, (reference,)),
        averages.component("average", averages.Average),
    )
    trials = [(CAUSAL, subject("mixer", kind, registry=registry)) for kind in ("leaving", "average")]
    examine(*trials[1], examples=1)  # what is imported late is here before processes are forked
    return trials


@pytest.mark.parametrize(
    ("leaves", "why"),
    [
        (lambda: os._exit(0), "exit code 0"),
        (lambda: os._exit(3), "exit code 3"),
        (crashing, f"SIGSEGV: {place(crashing, 1)}"),
        (lambda: os.killpg(0, 9), "SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "SIGTERM"),
        (leaving_another_behind, "exit code 3"),
    ],
    ids=["leaves as if all were well", "leaves", "crashes", "is killed", "is terminated", "leaves another"],
)
def test_a_part_that_ends_its_process_breaks_its_own_law_alone(
    tried: Any, monkeypatch: pytest.MonkeyPatch, leaves: Any, why: str
) -> None:
    monkeypatch.setattr(Leaving, "leaves", staticmethod(leaves))
    broken, held = guarded(tried)
    assert (broken.kind, broken.verdict, broken.why) == ("leaving", "broken", f"ended the process with {why}")
    assert (held.kind, held.verdict) == ("average", "held")
    # The case that it did not come back from can be pasted into a test.
    assert broken.values["tokens"] >= LONG
    assert "replay(" in broken.counterexample()


def test_a_part_that_never_returns_breaks_its_law_and_is_told_where_it_stands(
    tried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Leaving, "leaves", staticmethod(sleeping))
    (found,) = guarded(tried[:1], patience=4.0)
    assert not found.held
    assert found.why == f"was not done after 4 s: {place(sleeping, 2)}"


@pytest.mark.parametrize("closes", [closing, closing_and_sleeping, lambda: os._exit(CLOSED)])
def test_a_part_that_closes_what_is_not_its_own_breaks_its_law_at_once(
    tried: Any, monkeypatch: pytest.MonkeyPatch, closes: Any
) -> None:
    monkeypatch.setattr(Leaving, "leaves", staticmethod(closes))
    broken, held = guarded(tried, patience=float("inf"))
    assert (broken.verdict, broken.why, held.verdict) == ("broken", CLOSES, "held")
    assert broken.seconds < 60


def test_a_part_that_leaves_the_group_of_its_process_is_ended_all_the_same(
    tried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Leaving, "leaves", staticmethod(leaving_its_group))
    (found,) = guarded(tried[:1], patience=4.0)
    assert found.why == f"was not done after 4 s: {place(sleeping, 2)}"


def test_a_part_that_forks_is_told_of_once(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[int] = []

    def fork() -> None:
        if not forked:
            forked.append(0)
            os.fork()

    monkeypatch.setattr(Leaving, "leaves", staticmethod(fork))
    kinds = [(each.law, each.kind) for each in guarded([*tried, tried[0]])]
    assert kinds == [("mixer.causal", "leaving"), ("mixer.causal", "average"), ("mixer.causal", "leaving")]


def test_a_part_prints_whoever_writes_in_the_parent_meanwhile(
    tried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar of progress is drawn by another thread, which holds a lock while it writes."""
    lock = threading.Lock()

    class Locked:
        def write(self, text: str) -> int:
            with lock:
                return len(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(Leaving, "leaves", staticmethod(lambda: print("a debugging line")))
    monkeypatch.setattr(sys, "stdout", Locked())
    trying = guarded(tried[:1], patience=30.0)
    with lock:
        (found,) = trying
    assert found.verdict == "held"


def test_laws_tried_in_a_process_of_their_own_find_what_they_find_here(tried: Any) -> None:
    here = [examine(law, part, examples=5, seed=3) for law, part in tried]
    there = list(guarded(tried, examples=5, seed=3))
    assert [(each.verdict, each.cases) for each in there] == [(each.verdict, each.cases) for each in here]


def test_what_a_part_prints_is_no_part_of_a_report(
    tried: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Leaving, "leaves", staticmethod(lambda: os.write(1, b"a debugging line\n")))
    assert all(each.held for each in guarded(tried))
    out, err = capfd.readouterr()
    assert out == ""
    assert "a debugging line" in err


def test_an_error_that_is_not_the_parts_reaches_the_user(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("nothing that is installed takes a mixer")

    monkeypatch.setattr(guards, "examine", refuse)
    with pytest.raises(Exception, match="nothing that is installed takes a mixer"):
        list(guarded(tried))


def test_all_laws_of_all_parts_are_tried_unless_one_is_named(tried: Any) -> None:
    parts = [part for _, part in tried]
    assert [(law.id, part.kind) for law, part in trials(parts, "mixer.causal")] == [
        ("mixer.causal", "leaving"),
        ("mixer.causal", "average"),
    ]
    assert len(trials(parts)) > 20


def test_the_process_of_a_check_that_is_killed_does_not_outlive_it(
    tried: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noted = tmp_path / "process"

    def stays() -> None:
        noted.write_text(str(os.getpid()))
        sleeping()

    monkeypatch.setattr(Leaving, "leaves", staticmethod(stays))
    check = get_context("fork").Process(target=lambda: list(guarded(tried[:1])))
    check.start()
    until = time.monotonic() + 60
    while not (noted.exists() and noted.read_text()):
        assert time.monotonic() < until
        time.sleep(0.02)
    check.kill()
    check.join()
    state = Path(f"/proc/{noted.read_text()}/stat")
    until = time.monotonic() + 10
    # It is gone, or dead until whoever inherits it has looked.
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX":
        if time.monotonic() > until:
            os.kill(int(noted.read_text()), signal.SIGKILL)
            pytest.fail("the process outlives the check")
        time.sleep(0.02)
