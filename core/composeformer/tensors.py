"""What enters and leaves the parts of a built model: NamedTuples of tensors.

Shapes: B rows, T new tokens, D hidden size, R half of a rotary width. NamedTuples, because pipelining
splits them along the batch and FSDP2 and `torch.compile` accept them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from composeformer.contracts import Phase
from composeformer.counting import orders


class Rotary(NamedTuple):
    """Rotary tables in fp32, one angle per pair of features."""

    cos: Float[Tensor, "B T R"]
    sin: Float[Tensor, "B T R"]


class Batch(NamedTuple):
    """One forward's tokens. `documents` and `valid` are None where all tokens are one document, none is padding.

    `documents` number a row's documents in their order, no number twice. `positions` are what rotates, and
    count from 0 within each document unless they were given; they do not say what a query sees: the order of
    the real tokens and their documents do (`own_keys`, a cache). Padding has any position and document.
    `tables` are the rotary tables by key, made once per forward by the decoder and never cast.
    """

    ids: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    documents: Int[Tensor, "B T"] | None = None
    valid: Bool[Tensor, "B T"] | None = None
    tables: Mapping[str, Rotary] = {}
    phase: Phase = "train"


class Aux(NamedTuple):
    """Side results by dotted path. Losses are sums over tokens or sequences, so micro-batches and ranks add;
    counts are int64; metrics are detached (sum, weight) pairs.
    """

    losses: Mapping[str, Tensor] = {}
    counts: Mapping[str, Tensor] = {}
    metrics: Mapping[str, tuple[Tensor, Tensor]] = {}


NO_AUX = Aux()


class Output(NamedTuple):
    """What a mixer, an ffn or a residual gives back."""

    hidden: Float[Tensor, "B T D"]
    aux: Aux = NO_AUX


class Routing(NamedTuple):
    """Which experts each token goes to, and what their outputs are multiplied by, in fp32 or wider.

    A token names K distinct experts; the number of experts itself stands for none.
    """

    indices: Int[Tensor, "*N K"]
    weights: Float[Tensor, "*N K"]
    aux: Aux = NO_AUX


class Prediction(NamedTuple):
    """What a predictor makes of the first T - k tokens: logits of the token k + 1 places on, k its depth.

    `batch` holds the tokens that each is to be followed by, so that an objective finds its labels as it does
    the model's own. `share` is this depth's share of the predictor's loss weight.
    """

    logits: Float[Tensor, "B S V"]
    hidden: Float[Tensor, "B S D"]
    batch: Batch
    share: float
    aux: Aux = NO_AUX


class ModelOutput(NamedTuple):
    """What a model gives back: logits, the normalised last hidden state, side results, further predictions."""

    logits: Float[Tensor, "B T V"]
    hidden: Float[Tensor, "B T D"]
    aux: Aux = NO_AUX
    predictions: Sequence[Prediction] = ()


def merge(parts: Sequence[Aux]) -> Aux:
    """The side results of several parts as one; their paths are disjoint."""
    if not any(any(part) for part in parts):
        return NO_AUX
    losses: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    for part in parts:
        losses.update(part.losses)
        counts.update(part.counts)
        metrics.update(part.metrics)
    return Aux(losses, counts, metrics)


def visible(
    queries: Int[Tensor, "_ T"],
    keys: Int[Tensor, "_ S"],
    query_documents: Int[Tensor, "B T"] | None,
    key_documents: Int[Tensor, "B S"] | None,
    window: int | None = None,
    holes: bool = True,
) -> Bool[Tensor, "_ T S"]:
    """Which keys each query may see: its own document, not later, not `window` or more tokens back.

    `queries` and `keys` are places in the row, counted in real tokens; a key at a negative one (padding, an
    unwritten slot) is seen by none. Without `holes` there is no such key.
    """
    query, key = queries[:, :, None], keys[:, None, :]
    seen = key <= query
    if holes:
        seen = seen & (key >= 0)
    if window is not None:
        seen = seen & (query - key < window)
    if query_documents is not None and key_documents is not None:
        seen = seen & (query_documents[:, :, None] == key_documents[:, None, :])
    return seen


def own_keys(batch: Batch, window: int | None = None) -> Bool[Tensor, "_ T T"] | None:
    """What each query sees of the batch's own tokens; None: itself and all before it."""
    tokens = batch.ids.shape[1]
    if batch.documents is None and batch.valid is None and (window is None or tokens <= window):
        return None
    queries = orders(batch.valid, tokens, batch.ids.device)
    keys = queries if batch.valid is None else queries.masked_fill(~batch.valid, -1)
    return visible(queries, keys, batch.documents, batch.documents, window)


DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int64": torch.int64,
    "bool": torch.bool,
}
