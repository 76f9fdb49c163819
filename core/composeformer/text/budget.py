"""What a template may spend: turns of loops, characters it writes, seconds, and the size of any one value.

A value can outgrow what it is made of by repetition, joining, padding and formatting. Each of these is
estimated from its operands before it happens, so that no single step is large; turns and the deadline bound
the number of steps.
"""

import re
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import Any

MAX_TURNS = 200_000
MAX_SECONDS = 10.0
MAX_SIZE = 8 << 20  # weight of one value, and characters of the whole output
MAX_BITS = 4096  # of an integer
ITEM = 16  # what an item of a list weighs, in characters
# a width of four digits or more, after a percent sign or in braces
WIDE = re.compile(r"%(\([^)]*\))?[-+ #_^0-9.*]*[0-9]{4}|\{[^{}]*[0-9]{4}")

PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice"}
FORMATTING = {"format", "format_map", "strftime"}
# What only picks from its operand, so that a long conversation is not weighed over and over.
PICKING = {"length", "count", "first", "last", "default", "d"}
PICKING |= {"map", "select", "reject", "selectattr", "rejectattr"}


class OverBudget(Exception):
    """A template that asks for more than its share."""


class Budget:
    """One rendering's; every method raises OverBudget."""

    def __init__(self) -> None:
        self._turns = MAX_TURNS
        # What is captured into variables is written twice or more before it reaches the output.
        self._characters = 4 * MAX_SIZE
        self._deadline = monotonic() + MAX_SECONDS

    def turn(self, literal: int = 0) -> None:
        """One turn of a loop or call of a macro, with the characters of plain text in its body."""
        self._turns -= 1
        if self._turns < 0:
            raise OverBudget(f"more than {MAX_TURNS} turns of its loops and macros")
        self._spend(literal)

    def write(self, value: object) -> None:
        self.measure("output", value, [])
        self._spend(weigh(value))

    def measure(self, operation: str, left: object, rest: list[Any]) -> None:
        """Before an operation on values (an operator, a filter's or a method's name)."""
        if estimate(operation, left, rest) > MAX_SIZE:
            raise OverBudget(f"a value out of proportion, by {operation!r}")
        self._spend(0)

    def items(self, iterator: Iterable[Any]) -> Iterator[Any]:
        """The items of an iterator of unknown length: a turn each, and their weight."""
        for item in iterator:
            self.turn(weigh(item))
            yield item

    def _spend(self, characters: int) -> None:
        self._characters -= characters
        if self._characters < 0:
            raise OverBudget(f"made more than {MAX_SIZE} characters")
        if monotonic() > self._deadline:
            raise OverBudget(f"took more than {MAX_SECONDS:g} seconds")


def weigh(value: object) -> int:
    """Characters in a value, nested ones as often as they appear, and ITEM per item; stops above MAX_SIZE."""
    total = 0
    pending = [value]
    while pending and total <= MAX_SIZE:
        item = pending.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, dict):
            total += 2 * ITEM * len(item)
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            total += ITEM * len(item)
            pending.extend(item)
        elif type(item).__name__ == "Namespace":
            # jinja2's, which keeps what it holds out of sight of templates and prints it
            pending.append(object.__getattribute__(item, "_Namespace__attrs"))
            total += ITEM
    return total


def estimate(operation: str, left: Any, rest: list[Any]) -> int:
    """An upper bound on the weight of what an operation makes, as far as it can be out of proportion."""
    right = rest[0] if rest else None
    if operation in PICKING:
        return 0
    if operation in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        power = operation == "**"
        bits = left.bit_length() * max(right, 0) if power else left.bit_length() + right.bit_length()
        return MAX_SIZE + 1 if bits > MAX_BITS else bits
    if operation == "*":
        times, repeated = (left, right) if isinstance(left, int) else (right, left)
        return weigh(repeated) * times if isinstance(times, int) else 0
    if operation in FORMATTING or (operation == "%" and isinstance(left, str)):
        return _formatted(left, rest)
    if operation in PADDING:
        # widths as numbers, or as the text to pad with
        width = sum(abs(value) if isinstance(value, int) else weigh(value) for value in rest)
        return (_length(left) + 1) * max(width, 1)
    if operation == "join":
        items, between = (right, left) if isinstance(left, str) and right is not None else (left, right)
        return weigh(items) + _length(items) * _length(between)
    if operation in ("replace", "translate"):
        return (_length(left) + 1) * max(weigh(rest), 1) if weigh(rest) > 256 else 0
    if operation == "sum":
        return MAX_SIZE + 1 if any(isinstance(value, list | tuple) for value in rest) else 0
    return sum(map(weigh, (left, *rest)))


def _length(value: object) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _formatted(template: object, values: list[Any]) -> int:
    """A WIDE template is out of proportion, and so is a width taken from a value as large."""
    if not isinstance(template, str):
        return 0
    from_value = "*" in template or re.search(r"\{[^{}]*\{", template) is not None
    flat = [item for value in values for item in (value if isinstance(value, tuple | list) else [value])]
    flat = [item for value in flat for item in (value.values() if isinstance(value, dict) else [value])]
    wide = any(isinstance(value, int) and abs(value) > 999 for value in flat)
    if WIDE.search(template) or (from_value and wide):
        return MAX_SIZE + 1
    # a field can show any of the values, and the shortest is two characters
    return len(template) * max(1, weigh(flat) // 2)
