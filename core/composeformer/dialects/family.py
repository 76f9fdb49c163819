"""One dialect file, read strictly: the records that the rest of the package works with."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import attrs
import tomli

from composeformer.dialects import parsing
from composeformer.dialects.expressions import Expression
from composeformer.dialects.factors import Factors, factors_line
from composeformer.dialects.lines import UNSET, Fixed, Key, Pattern, Refusal, TensorLine
from composeformer.dialects.parsing import Table
from composeformer.errors import DialectError, show

SOURCES = ("huggingface", "gguf")
FORMAT = 1


@attrs.frozen(kw_only=True)
class Family:
    """How one ecosystem names one family of models."""

    name: str
    source: str
    model_type: str
    architectures: tuple[str, ...]
    ignore: frozenset[str]
    keys: tuple[Key, ...]
    fixed: tuple[Fixed, ...]
    patterns: tuple[Pattern, ...]
    tensors: tuple[TensorLine, ...]
    factors: tuple[Factors, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    @cached_property
    def pattern_names(self) -> frozenset[str]:
        return frozenset(pattern.name for pattern in self.patterns)

    @cached_property
    def names(self) -> frozenset[str]:
        """What expressions may call by name, layers apart."""
        return frozenset(key.name for key in self.keys if key.name is not None)

    def by_layer(self, line: Key | Fixed | TensorLine) -> bool:
        """Whether the line holds in some layers and not in others."""
        return line.when is not None and bool(line.when.names & self.pattern_names)


def parse(text: str, label: str) -> Family:
    """A dialect from its TOML text. Raises DialectError naming `label` and the place of what is wrong."""
    try:
        data = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise DialectError(f"{label}: {error}") from None
    try:
        return _family(data, label)
    except DialectError as error:
        line = error.lines[0]
        raise DialectError(line if line.startswith(label) else f"{label}: {line}") from None


def _family(data: Mapping[str, Any], label: str) -> Family:
    t = Table(data, label)
    if t.take("format", required=True) != FORMAT:
        t.fail(f"format must be {FORMAT}")
    name, source = str(t.text("name", required=True)), str(t.text("source", required=True))
    if source not in SOURCES:
        t.fail(f"source = {show(source)}: must be one of {', '.join(SOURCES)}")
    model_type = str(t.text("model_type", required=True))
    architectures = t.texts("architectures")
    if source == "huggingface" and not architectures:
        t.fail("needs `architectures`")
    ignore = t.texts("ignore")
    # What the tensors say comes first: the config may be held to it.
    keys = [parsing.key(k, table, f"{label}: shapes.{k}", shape=True) for k, table in _tables(t, "shapes")]
    keys += [parsing.key(k, table, f"{label}: config.{k}") for k, table in _tables(t, "config")]
    fixed = [f for path, it in _tables(t, "ours") for f in parsing.fixed(path, it, f"{label}: ours.{path}")]
    patterns = [parsing.pattern(n, table, f"{label}: patterns.{n}") for n, table in _tables(t, "patterns")]
    divisors = [factors_line(k, table, f"{label}: factors.{k}") for k, table in _tables(t, "factors")]
    refused, found = t.take("refuse"), t.take("tensors")
    if not isinstance(refused, list) and refused is not UNSET:
        t.fail("refuse must be a list")
    refusals = [
        parsing.refusal(each, f"{label}: refuse.{index}")
        for index, each in enumerate([] if refused is UNSET else refused)
    ]
    if not isinstance(found, list):
        t.fail("needs `tensors`, a list")
    tensors = [parsing.tensor(table, f"{label}: tensors.{index}") for index, table in enumerate(found)]
    t.done()
    family = Family(
        name=name,
        source=source,
        model_type=model_type,
        architectures=architectures,
        ignore=frozenset(ignore),
        keys=tuple(keys),
        fixed=tuple(fixed),
        patterns=tuple(patterns),
        tensors=tuple(tensors),
        factors=tuple(divisors),
        refusals=tuple(refusals),
    )
    _check(family, t)
    return family


def _tables(t: Table, name: str) -> Iterable[tuple[str, Any]]:
    found = t.take(name)
    if found is UNSET:
        return ()
    if not isinstance(found, dict):
        t.fail(f"{name} must be a table")
    return list(found.items())


def _check(family: Family, t: Table) -> None:
    """Names that can not be told apart, and expressions of names that nothing defines."""
    owners: dict[str, str] = {}
    for key in family.keys:
        path = key.ours[0] if key.ours else key.theirs
        if key.name is not None and owners.setdefault(key.name, path) != path:
            t.fail(f"{key.name} names both {owners[key.name]} and {path}; give one a `name`")
    if "num_layers" not in family.names:
        t.fail("no line fills num_layers")
    known = family.names | family.pattern_names
    found = [e for key in family.keys for e in (key.when, key.default, key.null, key.require)]
    found += [each.when for key in family.keys for each in key.choices]
    found += [each.when for each in family.fixed]
    found += [e for each in family.refusals for e in (each.when, each.layer)]
    found += [e for key in family.keys if key.stored is not None for e in key.stored.holes]
    expressions = [e for e in found if isinstance(e, Expression)]
    for expression in expressions:
        if wrong := expression.names - known:
            t.fail(f"{expression.text} uses {', '.join(sorted(wrong))}, which no line defines")
    for line in family.tensors:
        indices = {"l"} | ({line.stack[0]} if line.stack else set())
        if wrong := line.names - known - indices:
            t.fail(f"tensors: {line.label} uses {', '.join(sorted(wrong))}, which no line defines")
