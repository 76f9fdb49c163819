"""What a training step reads: rows of token ids, which of them are real, which document each is of."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from composeformer.counting import count_documents, count_positions
from composeformer.tensors import Batch


class TokenBatch(NamedTuple):
    """Rows of tokens. `valid` is False at padding, `documents` numbers packed documents.

    Without them all tokens are real and a row is one document. Positions count from 0 within each document
    unless they are given.
    """

    ids: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None = None
    documents: Int[Tensor, "B T"] | None = None
    positions: Int[Tensor, "B T"] | None = None

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]

    def seen(self) -> Batch:
        """The same as an objective sees it: documents numbered in order, no rotary tables."""
        positions, documents = self.positions, self.documents
        if positions is None:
            positions = count_positions(self.ids, documents, self.valid)
        if documents is not None:  # one that comes back after another is a new one
            documents = count_documents(documents, self.valid).number
        return Batch(self.ids, positions, documents, self.valid)

    def padded(self, length: int) -> "TokenBatch":
        """The same tokens in rows of at least `length`, padding behind."""
        more = length - self.ids.shape[1]
        if more <= 0:
            return self
        valid = torch.ones_like(self.ids, dtype=torch.bool) if self.valid is None else self.valid
        wide = (None if tensor is None else pad(tensor, (0, more)) for tensor in self._replace(valid=valid))
        return TokenBatch(*wide)  # type: ignore[arg-type]

    def num_tokens(self) -> Int[Tensor, ""]:
        """How many tokens are real."""
        if self.valid is None:
            return torch.tensor(self.ids.numel(), device=self.ids.device)
        return self.valid.sum()
