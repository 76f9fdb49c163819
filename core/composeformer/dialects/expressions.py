"""Expressions in dialect files: integers, names, comparisons. Parsed and walked here, never run by Python.

`hidden_size // num_heads`, `l + num_layers`, `kind in ("linear", "yarn") and not tied`. In a name's text an
expression stands in braces: `layers.{l}.mixer.q.weight`.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import attrs

from composeformer.errors import DialectError, one_of, show

MAX_LENGTH = 200
LARGEST = 2**63

_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_HOLE = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[\w.-]+", re.ASCII)


@attrs.frozen
class Expression:
    """One expression, checked when it is made. Raises DialectError for anything outside the language."""

    text: str

    def __attrs_post_init__(self) -> None:
        _ = self.tree

    @cached_property
    def tree(self) -> ast.expr:
        if len(self.text) > MAX_LENGTH:
            raise DialectError(f"an expression of {len(self.text)} characters: at most {MAX_LENGTH}")
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError):
            raise DialectError(f"{show(self.text)} is no expression") from None
        _allowed(tree, self.text)
        return tree

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name))

    def value(self, names: Mapping[str, object]) -> Any:
        """The value where names have these values. Raises DialectError for unknown names and wrong types."""
        try:
            return _value(self.tree, names)
        except (TypeError, ZeroDivisionError):
            found = ", ".join(f"{name} = {show(names[name])}" for name in sorted(self.names) if name in names)
            raise DialectError(f"{self.text} has no value with {found}") from None

    def integer(self, names: Mapping[str, object]) -> int:
        """The value, which must be an integer."""
        found = self.value(names)
        if type(found) is not int:
            raise DialectError(f"{self.text} = {show(found)}: must be an integer")
        return found


@attrs.frozen
class Template:
    """A name with expressions in braces."""

    text: str

    def __attrs_post_init__(self) -> None:
        _ = self.holes

    @cached_property
    def holes(self) -> tuple[Expression, ...]:
        if not _NAME.fullmatch(_HOLE.sub("", self.text)):
            raise DialectError(f"{show(self.text)} is no tensor name")
        return tuple(Expression(text) for text in _HOLE.findall(self.text))

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset[str]().union(*(hole.names for hole in self.holes))

    def fill(self, names: Mapping[str, object]) -> str:
        values = iter([hole.integer(names) for hole in self.holes])
        return _HOLE.sub(lambda _: str(next(values)), self.text)

    def series(self, index: str, size: int, names: Mapping[str, object]) -> tuple[str, ...]:
        """The names where `index` counts from 0. Large models have tens of thousands, so the rest is filled once."""
        if any(index in hole.names and hole.text.strip() != index for hole in self.holes):
            return tuple(self.fill({**names, index: i}) for i in range(size))
        filled = ["" if index in hole.names else str(hole.integer(names)) for hole in self.holes]
        values = iter(filled)
        pieces = _HOLE.sub(lambda _: next(values) or "\0", self.text).split("\0")
        return tuple([str(i).join(pieces) for i in range(size)])


def _allowed(node: ast.expr, text: str) -> None:
    match node:
        case ast.Name() | ast.Constant(value=int() | str() | None):
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            below = [left, right]
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            below = [operand]
        case ast.BoolOp(values=values):
            below = values
        case ast.Tuple(elts=elements):
            below = elements
        case ast.Compare(left=left, ops=ops, comparators=right_sides) if {
            *map(type, ops)
        } <= _COMPARISONS.keys():
            below = [left, *right_sides]
        case _:
            raise DialectError(f"{show(text)} is no expression: {type(node).__name__} is not in the language")
    for each in below:
        _allowed(each, text)


def _value(node: ast.expr, names: Mapping[str, object]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            if name not in names:
                raise DialectError(f"no name {name!r} here; names: {one_of(sorted(names))}")
            return names[name]
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, names), _value(right, names)
            if type(a) is not int or type(b) is not int:
                raise TypeError
            result = _ARITHMETIC[type(op)](a, b)
            if abs(result) > LARGEST:
                raise DialectError(f"a number beyond {LARGEST}")
            return result
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, names)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, names)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(value, names) for value in values)
        case ast.BoolOp(values=values):
            return any(_value(value, names) for value in values)
        case ast.Tuple(elts=elements):
            return tuple(_value(element, names) for element in elements)
        case ast.Compare(left=left, ops=ops, comparators=right_sides):
            a = _value(left, names)
            for comparison, side in zip(ops, right_sides, strict=True):
                b = _value(side, names)
                if not _COMPARISONS[type(comparison)](a, b):
                    return False
                a = b
            return True
    raise AssertionError(node)
