"""A change: one convention that one model may follow and the other not, in words and as it is tried."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import attrs
from torch import Tensor

Steps = tuple[str | int, ...]
Source = Literal["spec", "tensors", "choice"]


@attrs.frozen(kw_only=True, eq=False)
class Change:
    """`edits` are values of an expanded spec by path, None for none; `tensors` take the place of others by name.

    `name` says what it is about, `here` and `there` how the two models have it, `where` the parts or tensors concerned.
    """

    source: Source
    name: str
    here: str
    there: str
    where: tuple[str, ...]
    edits: tuple[tuple[Steps, Any], ...] = ()
    tensors: Mapping[str, Tensor] = attrs.field(factory=dict)

    @property
    def told(self) -> str:
        """In one line: what it is, how it is here and there, and in how many places."""
        if self.source == "choice":
            return (
                f"{self.name}: {self.here} in both specs, but the tensors here are as {self.there} has them"
            )
        return f"{self.name}: {self.here} here, {self.there} in the trusted folder"

    @property
    def places(self) -> str:
        """The first of the places, and how many more there are."""
        more = len(self.where) - 1
        return self.where[0] + (f" and {more} more" if more else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "name": self.name,
            "source": self.source,
            "here": self.here,
            "there": self.there,
            "where": list(self.where),
            "told": self.told,
        }


def relevant(changes: Iterable[Change], path: str) -> list[Change]:
    """Those first that touch the component at `path`, or what is in it or around it; else in the order given."""

    def away(change: Change) -> bool:
        return not any(_nested(path, where) or _nested(where, path) for where in change.where)

    return sorted(changes, key=away)


def _nested(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")
