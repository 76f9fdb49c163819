"""Laws of embeddings: a token's vector is its id's alone.

Shapes: B rows, T tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from composeformer.testing.bounds import size
from composeformer.testing.case import Case
from composeformer.testing.law import law


def drawn(case: Case, rows: int, tokens: int) -> Tensor:
    """Token ids (B, T), the ends of the vocabulary among them."""
    ids = case.ids("ids", rows, tokens)
    ids[0, 0], ids[-1, -1] = 0, case.spec.model.vocab_size - 1
    return ids


@law(
    "embedding",
    "each-token-alone",
    "a token's vector is its id's, at every place and beside any others",
    kills="embedding-knows-its-place",
)
def each_token_alone(case: Case) -> None:
    ids = drawn(case, case.integer("rows", 1, 3), case.integer("tokens", 2, 6))
    case.settle(lambda model, at: case.part_of(model)(at), ids)
    with torch.no_grad():
        found = case.part(ids)
        case.equal(found.shape, (*ids.shape, case.spec.model.hidden_size), "the shape of the vectors")
        case.finite(found, "the vectors")
        order = torch.randperm(
            ids.numel(), generator=torch.Generator().manual_seed(case.integer("order", 0, 99))
        )
        moved = case.part(ids.flatten()[order].view(ids.shape))
        case.close(moved.flatten(0, 1), found.flatten(0, 1)[order], "the tokens in another order")
        whole = case.part(torch.arange(case.spec.model.vocab_size)[None])[0]
        case.close(found, whole[ids], "against the vectors of the whole vocabulary")


@law(
    "embedding",
    "rows",
    "a vector is scale times the id's row of the table; a row's gradient is scale times the sum of its tokens'",
    kills="embedding-without-its-scale",
    claimed=True,
)
def rows(case: Case) -> None:
    ids = drawn(case, case.integer("rows", 1, 3), case.integer("tokens", 1, 9))
    vocabulary, width = case.spec.model.vocab_size, case.spec.model.hidden_size
    (name,) = (n for n, each in case.node.weights.items() if each.shape == (vocabulary, width))
    table: Any = case.part.get_parameter(name)
    scale = getattr(case.config, "scale", 1.0)
    cotangent = case.normal("cotangent", *ids.shape, width)
    found = case.gradients(case.model, case.part, ids, cotangent)
    rows = table.detach().double()
    case.close(found["output"], scale * rows[ids], "the vectors")
    wanted = torch.zeros_like(rows)
    wanted.index_add_(0, ids.flatten(), scale * cotangent.double().flatten(0, 1))
    gradient = found[f"{case.node.path}.{name}"]
    # bfloat16 gradients of one row may be added up in that dtype.
    bound = scale * size(cotangent) * ids.numel()
    case.close(gradient, wanted, "the table's gradient", scale=bound)
    unused = torch.ones(vocabulary, dtype=torch.bool)
    unused[ids.flatten()] = False
    case.equal(gradient[unused], torch.zeros_like(gradient[unused]), "the gradient of rows that no token has")
