"""Laws of specs of whole models: written and read they are the same, and what no part knows is refused."""

import copy
from collections.abc import Iterator
from typing import Any

from composeformer.errors import SpecError
from composeformer.spec import Spec
from composeformer.spec.document import parse
from composeformer.spec.scanner import Path, dotted
from composeformer.testing.models import ModelCase, model_law

STRANGE = "unheard_of"


@model_law(
    "read",
    "a spec written as TOML and read is the same, with the same fingerprint; so is one made of its data",
    kills="numbers-are-rounded-in-writing",
    examples=10,
)
def read(case: ModelCase) -> None:
    spec = case.spec
    for name, again in (
        ("TOML", Spec(parse(spec.to_toml(), "written"), case.tried.registry)),
        ("data", case.spec_of(spec.to_dict())),
    ):
        case.equal(again, spec, f"the spec read from {name}")
        case.equal(again.fingerprint, spec.fingerprint, f"the fingerprint of the spec read from {name}")
        case.equal(again.layers, spec.layers, f"the layers read from {name}")
        case.equal(_values(again), _values(spec), f"the values read from {name}")


def _values(spec: Spec) -> dict[str, object]:
    return {path: value for path, value, _ in spec.values()}


@model_law(
    "refused",
    "an unknown key in any table is refused, and named",
    kills="unknown-keys-are-passed-over",
    examples=20,
)
def refused(case: ModelCase) -> None:
    data = copy.deepcopy(case.spec.to_dict())
    tables = list(_tables(data, ()))
    path, table = tables[case.integer("table", 0, len(tables) - 1)]
    table[STRANGE] = case.choice("value", [1, "x", True])
    try:
        case.spec_of(data)
    except SpecError as error:
        # A table of named components is told as a whole: it could be one component without a kind.
        told = [each for each in error.problems if STRANGE in each.field or each.field == dotted(path)]
        case.require(told, f"an unknown key in {dotted(path)} is refused as {error.problems[0]}")
    else:
        case.require(False, f"an unknown key is read without a word in {dotted(path) or 'the document'}")


def _tables(data: Any, path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every table at any depth, with its path."""
    if isinstance(data, dict):
        yield path, data
    below = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, each in below:
        yield from _tables(each, (*path, key))
