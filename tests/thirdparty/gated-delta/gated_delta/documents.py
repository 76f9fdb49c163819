"""Where a document starts: at a real token whose document is not that of the real token before it.

Shapes: B rows, T tokens.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def starts_of(
    documents: Int[Tensor, "B T"],
    real: Bool[Tensor, "B T"] | None,
    before: Int[Tensor, " B"] | None = None,
) -> Bool[Tensor, "B T"]:
    """Which tokens start one; `before` is the document that each row comes from. A row's first token starts one in
    any case, which forgets nothing.
    """
    if before is None:
        before = torch.full_like(documents[:, 0], -1)
    joined = torch.cat([before[:, None], documents], 1)
    place = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    if real is None:
        return documents != joined[:, :-1]
    # The newest real token before each, counted from 1; 0 is what came before the row.
    newest = torch.where(real, place + 1, 0).cummax(1).values
    previous = torch.cat([torch.zeros_like(newest[:, :1]), newest[:, :-1]], 1)
    return real & (documents != joined.gather(1, previous))


def last_of(
    documents: Int[Tensor, "B T"], real: Bool[Tensor, "B T"], before: Int[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """The document of each row's last real token; `before` where it has none."""
    place = torch.arange(1, documents.shape[1] + 1, device=documents.device)
    newest = torch.where(real, place, 0).amax(1)
    return torch.cat([before[:, None], documents], 1).gather(1, newest[:, None])[:, 0]
