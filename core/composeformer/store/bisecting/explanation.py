"""What a search found: steps in the order in which they act, what still differs, and what was tried; in words."""

from collections.abc import Sequence
from typing import Any

import attrs

from composeformer.store.bisecting.change import Change
from composeformer.store.outputs import Difference


@attrs.frozen(kw_only=True)
class Step:
    """Where the models differ first, and the changes that make that component agree."""

    first: Difference
    changes: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"first": attrs.asdict(self.first), "changes": [change.to_dict() for change in self.changes]}


@attrs.frozen(kw_only=True)
class Explanation:
    """Why outputs differ. `remaining` is the first component that differs even with all steps, None where they explain
    everything; `worst` is then the largest difference of any output. `tried` is everything that was tried, `unrelated`
    the tensors that differ in no known way, `borrowed` those that the steps ask for and only the trusted folder has,
    `note` what else there is to say.
    """

    steps: tuple[Step, ...]
    remaining: Difference | None
    worst: float | None
    tried: tuple[str, ...]
    unrelated: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()
    note: str = ""
    trials: int = 0

    @property
    def complete(self) -> bool:
        return self.remaining is None

    @property
    def lines(self) -> tuple[str, ...]:
        """In words, a line for each step and one for what comes of all of them."""
        told = [self.note] if self.note else []
        for index, step in enumerate(self.steps):
            lead = "with that, " if index else ""
            changes = "; and ".join(f"{change.told} ({change.places})" for change in step.changes)
            told.append(f"{lead}{step.first.where} differs first ({step.first.told}); explained by {changes}")
        with_it = _with(sum(len(step.changes) for step in self.steps))
        if self.borrowed:
            with_it += f"and what only the trusted folder has ({_listed(self.borrowed, 3)}) "
        if self.remaining is None:
            if self.steps:
                told.append(f"{with_it}the outputs {agreement(self.worst)}")
            return tuple(told)
        still = "still differs" if self.steps else "differs first"
        where = f"{with_it}{self.remaining.where} {still} ({self.remaining.told})"
        tried = f"tried: {_listed(self.tried)}" if self.tried else "no convention applies"
        told.append(f"{where}, and nothing known explains it; {tried}")
        if self.unrelated:
            names = _listed(self.unrelated)
            told.append(f"no order, scale or exchange relates {names} to the trusted tensors")
        return tuple(told)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "complete": self.complete,
            "steps": [step.to_dict() for step in self.steps],
            "remaining": None if self.remaining is None else attrs.asdict(self.remaining),
            "worst": self.worst,
            "tried": list(self.tried),
            "unrelated_tensors": list(self.unrelated),
            "borrowed_tensors": list(self.borrowed),
            "trials": self.trials,
            "told": list(self.lines),
        }


def harmless(outputs: Sequence[Difference]) -> Explanation:
    """What is to be said of models whose outputs all agree, but not their specs or tensors."""
    worst = max((each.relative or 0.0 for each in outputs), default=0.0)
    note = f"what differs changes nothing on these tokens: all outputs {agreement(worst)}"
    return Explanation(steps=(), remaining=None, worst=worst, tried=(), note=note)


def agreement(worst: float | None) -> str:
    """How alike outputs are whose largest difference this is, in words."""
    return f"agree within {worst:.2g}" if worst else "are equal"


def _with(count: int) -> str:
    return {0: "", 1: "with it ", 2: "with both "}.get(count, f"with all {count} ")


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
