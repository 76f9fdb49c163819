"""Trying laws on parts, and what came of it: a certificate, and for a broken law the smallest counterexample.

A counterexample is the values that the law drew; `replay` runs the law on them again.
"""

import pprint
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import isfinite
from typing import Any, Literal

import attrs
import hypothesis
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from composeformer.errors import ComposeError
from composeformer.registry import Registry
from composeformer.testing.case import Case
from composeformer.testing.drawing import Draw, Drawn, Given
from composeformer.testing.law import MODEL, Law, LawBroken, find_law, laws_for, model_laws
from composeformer.testing.models import ModelCase, Models, models
from composeformer.testing.steady import steady
from composeformer.testing.subject import Subject, subject

Verdict = Literal["held", "broken", "does not apply"]
Tried = Subject | Models
# What is told of each draw: how many cases were tried before this one, and its values so far.
Watch = Callable[[int, Mapping[str, Any]], None]


@attrs.frozen(kw_only=True)
class Finding:
    """What one law found of one part. `error` and `bound` are of the comparison that came nearest to failing; both are
    0 where a law compares exactly. `cases` counts the cases tried, without those that shrink a counterexample.
    """

    law: str
    told: str
    slot: str
    kind: str
    implementation: str
    verdict: Verdict
    cases: int
    error: float
    bound: float
    seed: int
    seconds: float
    why: str = ""
    values: Mapping[str, Any] | None = None
    spec: str | None = None

    @classmethod
    def of(cls, law: Law, tried: Tried, **more: Any) -> "Finding":
        """A finding of a law and what it was tried on; `more` are the other fields."""
        return cls(
            law=law.id,
            told=law.told,
            slot=tried.slot,
            kind=tried.kind,
            implementation=tried.implementation.name,
            **more,
        )

    @property
    def held(self) -> bool:
        return self.verdict != "broken"

    def counterexample(self) -> str:
        """A test that fails as this law did; empty where it held."""
        if self.values is None:
            return ""
        name = "".join(c if c.isalnum() else "_" for c in f"{self.law}_{self.kind}")
        given = textwrap.indent(
            pprint.pformat(dict(self.values), width=100, sort_dicts=False), " " * 8
        ).lstrip()
        return (
            "from composeformer.testing import replay\n\n\n"
            f"def test_{name}():\n"
            "    replay(\n"
            f"        {self.law!r},\n"
            f"        {self.kind!r},\n"
            f"        slot={self.slot!r},\n"
            f"        implementation={self.implementation!r},\n"
            f"        values={given},\n"
            "    )\n"
        )

    def __str__(self) -> str:
        told = f"{self.law}: {self.slot} {self.kind} ({self.implementation}): {self.why}"
        example = self.counterexample()
        return f"{told}\n\n{example}" if example else told

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        numbers = {
            name: each if isfinite(each) else None
            for name, each in (("error", self.error), ("bound", self.bound))
        }
        return {**attrs.asdict(self), **numbers, "counterexample": self.counterexample() or None}


@attrs.frozen(kw_only=True)
class Certificate:
    """The findings of all laws tried."""

    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if not each.held)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"held": not self.broken, "findings": [each.to_dict() for each in self.findings]}


class _Trial:
    """What is remembered over the cases of one law."""

    def __init__(self, law: Law, tried: Tried) -> None:
        self.law, self.tried = law, tried
        self.cases = 0
        self.error = self.bound = 0.0
        self.refusals: list[str] = []
        self.failure: tuple[dict[str, Any], BaseException, str | None] | None = None

    def run(self, draw: Draw) -> None:
        case = ModelCase(self.tried, draw) if isinstance(self.tried, Models) else Case(self.tried, draw)
        try:
            self.law.run(case)
        except BaseException as error:
            if _says_nothing(error):
                raise
            self.cases += self.failure is None
            self.failure = draw.values, error, _spec(case)
            self.error, self.bound = case.error, case.bound
            if isinstance(error, Exception):
                raise
            # A part's own sys.exit would end the run, and with a status that says that all is well.
            raise LawBroken(_line(error)) from error
        self.cases += self.failure is None
        if (case.error or case.bound) and case.error * self.bound >= self.error * case.bound:
            self.error, self.bound = case.error, case.bound


def examine(
    law: Law,
    tried: Tried,
    *,
    examples: int | None = None,
    seed: int = 0,
    shrink: bool = True,
    watch: Watch | None = None,
) -> Finding:
    """Tries a law on a part, or on whole models, in `examples` cases or the law's own number. Raises nothing that
    those do wrong. `watch` is told of every draw.
    """
    begun = time.monotonic()
    trial = _Trial(law, tried)
    why = law.applies(tried) if law.applies is not None and isinstance(tried, Subject) else None

    def finding(verdict: Verdict, why: str = "", **more: Any) -> Finding:
        return Finding.of(
            law,
            tried,
            verdict=verdict,
            cases=trial.cases,
            error=trial.error,
            bound=trial.bound,
            seed=seed,
            seconds=time.monotonic() - begun,
            why=why,
            **more,
        )

    if why is not None:
        return finding("does not apply", why)
    phases = (Phase.generate, Phase.shrink) if shrink and law.shrinks else (Phase.generate,)

    @hypothesis.seed(seed)
    @settings(
        max_examples=law.examples if examples is None else examples,
        phases=phases,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.data())
    def cases(data: st.DataObject) -> None:
        trial.run(Drawn(data, trial.refusals, None if watch is None else partial(watch, trial.cases)))

    try:
        with poisoned(), steady():
            cases()
    except Unsatisfiable:
        pass
    except Exception:
        if trial.failure is None:
            raise
    if trial.failure is not None:
        values, error, spec = trial.failure
        return finding("broken", _line(error), values=values, spec=spec)
    if not trial.cases:
        refused = trial.refusals[-1] if trial.refusals else "none could be drawn"
        return finding("broken", f"no case could be made: {refused}")
    return finding("held")


def laws_to_try(tried: Tried) -> tuple[Law, ...]:
    """The laws of a part, or of whole models. Raises InputError for a claim that is no law."""
    return model_laws() if isinstance(tried, Models) else laws_for(tried.component)


def trials(tried: Iterable[Tried], only: str | None = None) -> list[tuple[Law, Tried]]:
    """Every law of every part, or the law `only`. Raises InputError for a law or a claim that there is not."""
    wanted = None if only is None else find_law(only)
    return [(law, each) for each in tried for law in laws_to_try(each) if wanted is None or law is wanted]


def certify(
    tried: Iterable[Tried], *, examples: int | None = None, seed: int = 0, only: str | None = None
) -> Iterator[Finding]:
    """Tries every law of every part, or the law `only`, in this process. Raises InputError for a law or a claim that
    there is not.
    """
    for law, each in trials(tried, only):
        yield examine(law, each, examples=examples, seed=seed)


def replay(
    law: str,
    kind: str,
    *,
    slot: str,
    implementation: str = "reference",
    values: Mapping[str, Any],
    registry: Registry | None = None,
) -> None:
    """Runs a law on the values of a counterexample. Raises what the law raises, LawBroken or a part's own error."""
    with poisoned():
        if slot == MODEL:
            (whole,) = models(kind, registry)
            find_law(law).run(ModelCase(whole, Given(values)))
        else:
            find_law(law).run(Case(subject(slot, kind, implementation, registry), Given(values)))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN, or the largest integer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def _says_nothing(error: BaseException) -> bool:
    """Whether an exception is hypothesis's own way to end a case, or the user's to end all."""
    return isinstance(error, KeyboardInterrupt) or type(error).__module__.startswith("hypothesis")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, LawBroken | ComposeError):
        return text
    return f"raised {type(error).__name__}: {text}" if text else f"raised {type(error).__name__}"


def _spec(case: Case) -> str | None:
    return case.spec.to_toml() if "spec" in case.__dict__ else None
