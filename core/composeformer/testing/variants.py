"""The spec of a case with other values in the part under test."""

from typing import Any

from composeformer.spec import Spec
from composeformer.spec.scanner import dotted
from composeformer.testing.case import Case


def variant(case: Case, **values: Any) -> Spec:
    """The case's spec with fields of the part under test set anew. Raises SpecError where that is no valid model."""
    (path, *_) = case.node.part.paths
    return case.spec.with_({dotted((*path, name)): value for name, value in values.items()})
