"""Numbers that say what they are: a value, its unit, what it counts, and where what it was made of is from."""

from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Quantity:
    """A number of a report. `value` None: unknown, which is never zero. `confirmed` is False where an input of it was
    recalled and not read at its source.
    """

    value: float | None
    unit: str
    definition: str
    source: str = ""
    confirmed: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`; what says nothing is left out."""
        found: dict[str, Any] = {"value": self.value, "unit": self.unit, "definition": self.definition}
        found |= {"source": self.source} if self.source else {}
        return found if self.confirmed else found | {"confirmed": False}


Section = Mapping[str, Quantity]

_LETTERS = (
    (1e24, "Y"),
    (1e21, "Z"),
    (1e18, "E"),
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
)


def scaled(value: float, unit: str) -> str:
    """Four digits and a decimal prefix."""
    for bound, letter in _LETTERS:
        if abs(value) >= bound:
            return f"{value / bound:.4g} {letter}{unit}"
    return f"{value:.4g} {unit}"
