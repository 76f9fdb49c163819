"""Places of tokens: their order in a row, their positions in a document, the number of that document.

Only real tokens count. A document is a run of equal ids: an id that comes back after another starts a new
document, so documents are numbered by changes and compared by that number. A `Counted` of what came before
lets all three continue.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Counted(NamedTuple):
    """What a row knows of its last token: its document's id and number, and that document's tokens so far.

    Number -1: there is no token.
    """

    document: Int[Tensor, "..."]
    number: Int[Tensor, "..."]
    tokens: Int[Tensor, "..."]


def orders(valid: Bool[Tensor, "B T"] | None, tokens: int, device: torch.device) -> Int[Tensor, "_ T"]:
    """Each token's place among its row's real ones, from 0; padding has its predecessor's, or -1."""
    if valid is None:
        return torch.arange(tokens, device=device)[None]
    return valid.cumsum(1) - 1


def count_positions(
    ids: Int[Tensor, "B T"], documents: Int[Tensor, "B T"] | None, valid: Bool[Tensor, "B T"] | None
) -> Int[Tensor, "B T"]:
    """Positions from 0 within each document, real tokens only; padding repeats its predecessor's."""
    if documents is None:
        return orders(valid, ids.shape[1], ids.device).clamp(min=0).expand(ids.shape)
    counted = count_documents(documents, valid)
    return (counted.tokens - 1).clamp(min=0)


def count_documents(
    documents: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None, last: Counted | None = None
) -> Counted:
    """What each token's row knows at that token (B, T), continuing after `last` (B,)."""
    rows, tokens = documents.shape
    if last is None:
        last = nothing_counted(rows, documents.device)
    document, number, held = (each[:, None] for each in last)
    documents = documents.long()
    if valid is not None:
        # Padding takes the document of the real token before it, so that it neither starts nor ends one.
        place = torch.arange(tokens, device=documents.device)
        newest = torch.where(valid, place, -1).cummax(1).values
        documents = torch.where(newest < 0, document, documents.gather(1, newest.clamp(min=0)))
    starts = documents != torch.cat([document, documents[:, :-1]], 1)
    order = orders(valid, tokens, documents.device)
    # A row's very first token starts a document whatever its id.
    starts = starts | ((order == 0) & (number < 0))
    if valid is not None:
        starts = starts & valid
    first = torch.where(starts, order, -held).cummax(1).values
    return Counted(documents, number + starts.cumsum(1), order - first + 1)


def nothing_counted(rows: int, device: torch.device) -> Counted:
    """Before a row's first token."""
    none = torch.zeros(rows, device=device, dtype=torch.int64)
    return Counted(none, none - 1, none)
