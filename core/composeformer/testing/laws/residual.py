"""Laws of residuals: they join sublayers, each called once, and mix no tokens themselves.

Shapes: B rows, T tokens, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from composeformer.decoder import Model
from composeformer.tensors import Output
from composeformer.testing.case import Case
from composeformer.testing.law import law


def joined(case: Case, model: Model, x: Tensor, sublayers: Any) -> Tensor:
    """Hidden states (B, T, D) through one layer's residual around the sublayers given."""
    stream = model.residual.open(x)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    output: Output = case.part_of(model)(stream, model.batch(ids), sublayers)
    return output.hidden


@law(
    "residual",
    "identity",
    "sublayers that give zeros leave the stream as it is",
    kills="residual-adds-the-normalised",
    claimed=True,
)
def identity(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 3), case.integer("tokens", 1, 5)
    x = case.stream("x", rows, tokens)
    sublayers = {name: lambda y: Output(torch.zeros_like(y)) for name in case.node.site.sublayers}
    with torch.no_grad():
        case.equal(joined(case, case.model, x, sublayers), case.model.residual.open(x), "the stream")
