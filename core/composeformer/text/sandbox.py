"""Jinja for templates that nobody vouches for: what Hugging Face's chat templates use, within a budget.

A chat template arrives with a model, so it is a program by a stranger. jinja2's immutable sandbox keeps it
from Python's insides and from changing what it is given; it does not keep it from running forever or filling
memory. Here the parsed template is rewritten before it is compiled: every loop and macro counts its turns,
and every list, sum and concatenation is weighed (see `budget`).
"""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from composeformer.errors import MissingExtra
from composeformer.lazy import available
from composeformer.text.budget import MAX_SIZE, Budget, OverBudget

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def environment() -> "ImmutableSandboxedEnvironment":
    """An environment for one rendering: the budget is its own. Raises MissingExtra without jinja2."""
    if not available("jinja2"):
        raise MissingExtra("jinja2", "text", "rendering a chat template")
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}` marks what the model said, for training; rendering passes it through."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Metered(NodeTransformer):
        def turn(self, node: Any) -> Any:
            literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            self.generic_visit(node)
            call = nodes.Call(nodes.EnvironmentAttribute("turn"), [nodes.Const(literal)], [], None, None)
            node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
            return node

        def weighed(self, node: Any) -> Any:
            self.generic_visit(node)
            if getattr(node, "ctx", "load") != "load":
                return node
            return nodes.Filter(node, "weighed", [], [], None, None).set_lineno(node.lineno)

        def concatenation(self, node: Any) -> Any:
            self.generic_visit(node)
            parts = nodes.List(node.nodes).set_lineno(node.lineno)
            return nodes.Filter(parts, "join", [], [], None, None).set_lineno(node.lineno)

        visit_For = visit_Macro = visit_CallBlock = turn
        visit_List = visit_Tuple = visit_Dict = weighed
        visit_Concat = concatenation

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def __init__(self) -> None:
            self.budget = Budget()
            self.turn = self.budget.turn
            super().__init__(
                trim_blocks=True,
                lstrip_blocks=True,
                # folding constants would compute them before anything is measured
                optimized=False,
                finalize=self.written,
                extensions=[Generation, "jinja2.ext.loopcontrols"],
            )
            self.filters = {name: self.measured(name, function) for name, function in self.filters.items()}
            self.filters |= {"tojson": tojson, "weighed": self.measured("list", lambda value: value)}
            self.globals["raise_exception"] = raise_exception
            self.globals["strftime_now"] = self.measured(
                "strftime", lambda text: datetime.now().strftime(text)
            )
            self.globals["dict"] = self.measured("list", dict)
            del self.globals["lipsum"]  # text of any length

        def written(self, value: Any) -> Any:
            self.budget.write(value)
            return value

        def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
            return super()._generate(Metered().visit(source), *args, **kwargs)

        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            # jinja2 gives an undefined value, which prints as nothing; nobody asks for this by accident
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            self.budget.measure(operator, left, [right])
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            owner = getattr(function, "__self__", None)
            if isinstance(owner, str | bytes):
                function = self.measured(function.__name__, function, owner)
            return super().call(context, function, *args, **kwargs)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            return wrapped and self.measured("format", wrapped, value.__self__)

        def measured(self, name: str, function: Any, *owner: Any) -> Any:
            """`function` after a look at its arguments (`owner`: the text whose method it is)."""
            # a filter that takes the environment or context gets it first
            skip = 1 if hasattr(function, "jinja_pass_arg") else 0

            def look(*args: Any, **kwargs: Any) -> Any:
                before, given = args[:skip], list(args[skip:])
                if given and isinstance(given[0], Iterator):
                    items = self.budget.items(given[0])
                    given[0] = list(items) if name == "join" else items
                values = [*owner, *given]
                self.budget.measure(name, values[0] if values else None, [*values[1:], *kwargs.values()])
                return function(*before, *given, **kwargs)

            # jinja2 leaves its marks (the argument to pass) on the function itself
            look.__dict__.update(getattr(function, "__dict__", {}))
            return look

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    return Environment()


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as in transformers (jinja2's own escapes it for web pages), up to the size of any value."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if isinstance(indent, int) and indent > 64:
        raise OverBudget(f"tojson with an indent of {indent}")
    pieces, size = [], 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_SIZE:
            raise OverBudget(f"a value out of proportion, by {'tojson'!r}")
    return "".join(pieces)
