"""Next-token cross-entropy (`next-token`): the sum of -log p(token t+1 | tokens up to t), and their number.

The label at t is token t+1 of the same row, if both are real and of one document; else it is `IGNORE`. The
shift is that of transformers' causal language model loss given labels that are -100 at padding *and* at the
first token of a document: transformers itself would also learn a document's first token from the padding, or
from the document, before it.

Shapes: B rows, T tokens, V vocabulary; N = B T.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from composeformer.tensors import Batch, ModelOutput
from composeformer_training.config import NextToken

IGNORE = -100


class NextTokenLoss:
    """The objective; a `composeformer.train.Objective`."""

    def __init__(self, config: NextToken) -> None:
        self._chunk = config.chunk_tokens

    def labels(self, batch: Batch) -> Int[Tensor, "B T"]:
        """What each token is to predict, or `IGNORE`."""
        labels_BT = torch.full_like(batch.ids, IGNORE)
        learnt = torch.ones_like(batch.ids[:, 1:], dtype=torch.bool)
        if batch.valid is not None:
            learnt = batch.valid[:, 1:] & batch.valid[:, :-1]
        if batch.documents is not None:
            learnt = learnt & (batch.documents[:, 1:] == batch.documents[:, :-1])
        labels_BT[:, :-1] = torch.where(learnt, batch.ids[:, 1:], IGNORE)
        return labels_BT

    def weight(self, batch: Batch) -> Int[Tensor, ""]:
        """How many tokens have a label."""
        return (self.labels(batch) != IGNORE).sum()

    def __call__(self, outputs: ModelOutput, batch: Batch) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """The sum of the losses of all labels, in fp32 or wider, and their number; without labels a zero."""
        logits_NV = outputs.logits.flatten(0, 1)
        labels_N = self.labels(batch).flatten()
        weight = (labels_N != IGNORE).sum()
        if self._chunk is None:
            return _summed(logits_NV, labels_N), weight
        pieces = zip(torch.split(logits_NV, self._chunk), torch.split(labels_N, self._chunk))
        losses = [checkpoint(_summed, logits, labels, use_reentrant=False) for logits, labels in pieces]
        return torch.stack(losses).sum(), weight


def _summed(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return cross_entropy(wide, labels_N, ignore_index=IGNORE, reduction="sum")
