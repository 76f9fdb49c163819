"""Bugs of objectives and optimizers: labels, means, precision; decay, state, and learning rates that nobody reads."""

from collections.abc import Iterator

import torch
from museum_kit import mutant, replaced
from torch.nn.functional import cross_entropy, nll_loss

LOSS = "composeformer_training.next_token:NextTokenLoss"
SUMMED = "composeformer_training.next_token:_summed"
IGNORE = -100


@mutant(
    "loss-in-bfloat16",
    "objective",
    "next-token",
    "cross-entropy is computed in the dtype of the logits",
    source="fused losses under autocast; HF's removal of logits.float()",
)
def loss_in_bfloat16() -> Iterator[None]:
    def wrong(summed):
        def narrow(logits, labels):
            # PyTorch's kernel sums in fp32 and rounds the result.
            return cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").float()

        return narrow

    with replaced(SUMMED, wrong):
        yield


@mutant(
    "mean-over-the-batch",
    "objective",
    "next-token",
    "the loss is a mean, which n micro-batches add up to n means",
    source="pitfalls 2, end: TT PR2206; the gradient accumulation bug of transformers, 2024",
)
def mean_over_the_batch() -> Iterator[None]:
    def wrong(summed):
        def mean(logits, labels):
            return summed(logits, labels) / (labels != IGNORE).sum().clamp(min=1)

        return mean

    with replaced(SUMMED, wrong):
        yield


@mutant(
    "weight-counts-tokens",
    "objective",
    "next-token",
    "the weight told before a step counts tokens, that of a call counts labels",
    source="AM and Megatron: num_tokens from the loss mask of another shift",
)
def weight_counts_tokens() -> Iterator[None]:
    def wrong(weight):
        def tokens(self, batch):
            return torch.tensor(batch.ids.numel()) if batch.valid is None else batch.valid.sum()

        return tokens

    with replaced(f"{LOSS}.weight", wrong):
        yield


@mutant(
    "mean-of-nothing",
    "objective",
    "next-token",
    "a mean times the number of labels: NaN where there is none",
    source="pitfalls 2, end: AM#3796, OLMo-core PR657",
)
def mean_of_nothing() -> Iterator[None]:
    def wrong(summed):
        def mean(logits, labels):
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return cross_entropy(wide, labels, ignore_index=IGNORE) * (labels != IGNORE).sum()

        return mean

    with replaced(SUMMED, wrong):
        yield


@mutant(
    "padding-is-a-label",
    "objective",
    "next-token",
    "the last real token is to predict the padding behind it",
    source="pitfalls 2, 10 and 23: PaddleFleet PR1808; pad tokens that equal the end of text",
)
def padding_is_a_label() -> Iterator[None]:
    def wrong(labels):
        return lambda self, batch: labels(self, batch._replace(valid=None))

    with replaced(f"{LOSS}.labels", wrong):
        yield


@mutant(
    "labels-across-documents",
    "objective",
    "next-token",
    "a document's last token is to predict the next document's first",
    source="pitfalls 2, 24: HF PR46634, axolotl PR3796, nanoVLM PR204",
)
def labels_across_documents() -> Iterator[None]:
    def wrong(labels):
        return lambda self, batch: labels(self, batch._replace(documents=None))

    with replaced(f"{LOSS}.labels", wrong):
        yield


@mutant(
    "last-chunk-is-lost",
    "objective",
    "next-token",
    "tokens behind the last whole chunk are in no loss",
    source="chunked losses that split by floor division",
)
def last_chunk_is_lost() -> Iterator[None]:
    def wrong(call):
        def floored(self, outputs, batch):
            if self._chunk is None:
                return call(self, outputs, batch)
            whole = outputs.logits.flatten(0, 1)
            labels = self.labels(batch).flatten()
            weight = (labels != IGNORE).sum()
            size = len(labels) // self._chunk * self._chunk
            return cross_entropy(
                whole[:size].to(torch.promote_types(whole.dtype, torch.float32)),
                labels[:size],
                ignore_index=IGNORE,
                reduction="sum",
            ) + 0 * whole.sum(), weight

        return floored

    with replaced(f"{LOSS}.__call__", wrong):
        yield


@mutant(
    "labels-written-into-the-ids",
    "objective",
    "next-token",
    "labels are made of the batch's own ids, in place",
    source="labels = input_ids; labels[mask] = -100: collators without a clone",
)
def labels_written_into_the_ids() -> Iterator[None]:
    def wrong(labels):
        def in_place(self, batch):
            found = labels(self, batch)
            if batch.valid is not None:
                batch.ids.masked_fill_(~batch.valid, 0)
            return found

        return in_place

    with replaced(f"{LOSS}.labels", wrong):
        yield


@mutant(
    "labels-not-shifted",
    "objective",
    "next-token",
    "a token is to predict itself",
    source="pitfalls 2, 23: labels that the caller was to shift, or that are shifted twice",
)
def labels_not_shifted() -> Iterator[None]:
    def wrong(labels):
        def same(self, batch):
            found = labels(self, batch)
            return torch.where(found == IGNORE, found, batch.ids)

        return same

    with replaced(f"{LOSS}.labels", wrong):
        yield


@mutant(
    "labels-shifted-twice",
    "objective",
    "next-token",
    "a token is to predict the one after the next",
    source="HF: labels shifted by the collator and again by the model",
    by="objective.next-token",
)
def labels_shifted_twice() -> Iterator[None]:
    def wrong(labels):
        def twice(self, batch):
            found = labels(self, batch)
            return torch.cat([found[:, 1:], torch.full_like(found[:, :1], IGNORE)], 1)

        return twice

    with replaced(f"{LOSS}.labels", wrong):
        yield


@mutant(
    "token-zero-is-ignored",
    "objective",
    "next-token",
    "labels of token 0 are ignored as if it were padding",
    source="pitfalls 2, 23: PaddleFleet PR1808 in reverse; ignore_index = pad_token_id",
)
def token_zero_is_ignored() -> Iterator[None]:
    def wrong(summed):
        return lambda logits, labels: summed(logits, labels.masked_fill(labels == 0, IGNORE))

    with replaced(SUMMED, wrong):
        yield


@mutant(
    "logarithm-of-a-sum-of-exponentials",
    "objective",
    "next-token",
    "the normaliser is the logarithm of plain exponentials, and overflows",
    source="hand-written losses; vocabulary-parallel ones without a common maximum",
)
def logarithm_of_a_sum() -> Iterator[None]:
    def wrong(summed):
        def plain(logits, labels):
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logs = wide - wide.exp().sum(-1, keepdim=True).log()
            return nll_loss(logs, labels, ignore_index=IGNORE, reduction="sum")

        return plain

    with replaced(SUMMED, wrong):
        yield
