"""The model of a case with other values in one part's table, and the very same weights."""

from typing import Any

from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.plan import Node
from composeformer.spec.scanner import dotted
from composeformer.testing.case import Case


def twin(case: Case, node: Node, **fields: Any) -> Model | None:
    """The case's model with `fields` set in the table of the part at `node`; None where that is no valid spec.

    Fields that change a tensor's shape are none for this.
    """
    path = dotted(node.stated.paths[0])
    try:
        spec = case.spec.with_({f"{path}.{name}": value for name, value in fields.items()})
    except SpecError:
        return None
    model = case.built(spec)
    model.load_state_dict(case.model.state_dict())
    return model
