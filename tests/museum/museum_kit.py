"""The museum: wrong variants of our own parts, each with one bug that somebody shipped, and the laws that tell.

A mutant is a context in which a part has the bug. Laws know nothing of it; a mutant that survives them is a missing
law. Each module `mutants_*.py` beside this one registers those of an area.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import attrs

from composeformer.testing import Finding, Subject, examine, subject
from composeformer.testing.certificate import laws_to_try
from composeformer.testing.law import MODEL
from composeformer.testing.models import ANY, Models, models


@attrs.frozen(eq=False, kw_only=True)
class Mutant:
    """A bug. `source` is where it was found (an issue, a row of a list), `told` what is wrong, `wrong()` the context in
    which the component `kind` of `slot` has it, in `implementation`. The law `by` is tried before others.
    """

    name: str
    told: str
    source: str
    slot: str
    kind: str
    implementation: str
    wrong: Callable[[], AbstractContextManager[None]]
    by: str = ""

    @property
    def subject(self) -> Subject | Models:
        return models()[0] if self.slot == MODEL else subject(self.slot, self.kind, self.implementation)


MUTANTS: dict[str, Mutant] = {}


def mutant(
    name: str,
    slot: str,
    kind: str,
    told: str,
    *,
    source: str,
    implementation: str = "reference",
    by: str = "",
) -> Callable[[Callable[[], Iterator[None]]], Mutant]:
    """Registers a generator function as the context of a mutant."""

    def make(wrong: Callable[[], Iterator[None]]) -> Mutant:
        if name in MUTANTS:
            raise ValueError(f"two mutants are called {name}")
        MUTANTS[name] = Mutant(
            name=name,
            told=told,
            source=source,
            slot=slot,
            kind=kind,
            implementation=implementation,
            wrong=contextmanager(wrong),
            by=by,
        )
        return MUTANTS[name]

    return make


def model_mutant(
    name: str, told: str, *, source: str, implementation: str = ANY, by: str = ""
) -> Callable[[Callable[[], Iterator[None]]], Mutant]:
    """The same for a bug that whole models show."""
    return mutant(name, MODEL, ANY, told, source=source, implementation=implementation, by=by)


@contextmanager
def replaced(place: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """The attribute at `package.module:Class.attribute` (or `package.module:function`) is `make(what it was)`."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    own = vars(owner).get(name)
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def everything() -> dict[str, Mutant]:
    """All mutants, by name."""
    for file in sorted(Path(__file__).parent.glob("mutants_*.py")):
        importlib.import_module(file.stem)
    return MUTANTS


# Which values hypothesis draws hangs on the modules that a process has imported: it tries the constants in them. A law
# that is to tell a mutant has its cases drawn from so many seeds before another may.
PATIENCE = 8


def kill(found: Mutant) -> Finding | None:
    """What the first law that it breaks says of a mutant: those that name it first. None where it survives."""
    named = laws_to_try(found.subject)
    laws = sorted(named, key=lambda law: (law.kills != found.name, law.id != found.by))
    with found.wrong():
        for law in laws:
            told = law.kills == found.name or law.id == found.by
            cases = 0
            for seed in range(PATIENCE if told else 1):
                finding = examine(law, found.subject, seed=seed, shrink=False)
                cases += finding.cases
                if not finding.held:
                    return attrs.evolve(finding, cases=cases)
    return None


__all__ = ["MUTANTS", "Mutant", "everything", "kill", "model_mutant", "mutant", "replaced"]
