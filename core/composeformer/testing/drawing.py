"""Where a case's values come from: drawn by hypothesis and remembered by label, or given again from what was.

Values are plain data, so that a counterexample can be printed, pasted and replayed.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from hypothesis import reject as hypothesis_reject
from hypothesis import strategies as st

from composeformer.errors import InputError, one_of


class Draw(Protocol):
    """A source of values; `values` are those given out so far, by label."""

    values: dict[str, Any]

    def __call__(self, label: str, strategy: "st.SearchStrategy[Any]") -> Any: ...

    def reject(self, why: str) -> NoReturn: ...


class Drawn:
    """Values that hypothesis draws. `refusals` gathers why cases were rejected; `watch` is told of each draw."""

    def __init__(
        self,
        data: "st.DataObject",
        refusals: list[str] | None = None,
        watch: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._data = data
        self._refusals = refusals
        self._watch = watch
        self.values: dict[str, Any] = {}

    def __call__(self, label: str, strategy: "st.SearchStrategy[Any]") -> Any:
        if label in self.values:
            raise ValueError(f"a law draws {label!r} twice")
        value = self._data.draw(strategy)
        self.values[label] = value
        if self._watch is not None:
            self._watch(self.values)
        return value

    def reject(self, why: str) -> NoReturn:
        """Ends the case: it says nothing."""
        if self._refusals is not None:
            self._refusals.append(why)
        hypothesis_reject()


class Given:
    """Values of a counterexample."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._given = dict(values)
        self.values: dict[str, Any] = {}

    def __call__(self, label: str, strategy: "st.SearchStrategy[Any]") -> Any:
        if label not in self._given:
            raise InputError(
                f"values: the law draws {label!r}, which is not given; given: {one_of(self._given)}"
            )
        self.values[label] = self._given[label]
        return self._given[label]

    def reject(self, why: str) -> NoReturn:
        raise InputError(f"the values make no case of this law: {why}")
