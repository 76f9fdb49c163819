"""Numbers of the outside world: each names its source, and says whether it was read there.

Profiles of hardware and clusters are TOML files of such numbers; a `Reader` checks one and gathers what is wrong.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from composeformer.config import Config, check, config, field
from composeformer.cost_config import LARGEST
from composeformer.errors import Problem, nearest, one_of
from composeformer.spec.document import Document
from composeformer.spec.scanner import dotted


@attrs.frozen(kw_only=True)
class Figure:
    """A number, where it is from, and whether it was read there or only recalled."""

    value: float
    source: str = ""
    read: bool = False


@config
class Amount(Config):
    """A number that a profile states."""

    value: float = field(minimum=0.0, maximum=LARGEST)
    source: str = field()
    read: bool = field()


@config
class Count(Config):
    """A number of things, one at least."""

    value: int = field(minimum=1)
    source: str = field()
    read: bool = field()


class Reader:
    """Reads tables of a document against config classes, and gathers what is wrong."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []

    def problem(self, path: Sequence[str], found: object, allowed: str, near: str | None = None) -> None:
        source = self.document.source(tuple(path))
        self.problems.append(Problem(dotted(tuple(path)), found, allowed, near, source))

    def mapping(self, path: Sequence[str], allowed: Iterable[str] | None = None) -> dict[str, Any] | None:
        """The table at a path, which must be there; its keys must be among those allowed."""
        found: Any = self.document.data
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            self.problem(path, found, "is required: a table")
            return None
        for key in found if allowed is not None else ():
            if key not in tuple(allowed or ()):
                told = f"unknown key; allowed: {one_of(allowed or ())}"
                self.problem((*path, key), None, told, nearest(key, allowed or ()))
        return found

    def table(
        self, cls: type[Config], path: Sequence[str], reserved: Iterable[str] = ()
    ) -> dict[str, Any] | None:
        """The values of a table, defaults filled in; None where something is wrong."""
        found = self.mapping(path)
        if found is None:
            return None
        values, problems = check(cls, found, reserved=reserved)
        for each in problems:
            self.problem((*path, each.field), each.found, each.allowed, each.nearest)
        return None if problems else attrs.asdict(cls(**values))  # type: ignore[arg-type]

    def figure(self, cls: type[Config], path: Sequence[str]) -> Figure | None:
        """A number with its source, an `Amount` or a `Count`."""
        values = self.table(cls, path)
        return None if values is None else Figure(**values)
