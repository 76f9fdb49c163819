"""Bugs of embeddings and heads."""

from collections.abc import Iterator

import attrs
import torch
from museum_kit import mutant, replaced
from torch import nn
from torch.nn import functional as F

ENDS = "composeformer_dense.ends"


@mutant(
    "embedding-without-its-scale",
    "embedding",
    "token",
    "the scale of the spec is not applied",
    source="Gemma's sqrt(hidden_size), lost in ports",
)
def embedding_without_its_scale() -> Iterator[None]:
    with replaced(
        f"{ENDS}:TokenEmbedding.forward", lambda _: lambda self, ids: F.embedding(ids, self.weight)
    ):
        yield


@mutant(
    "embedding-pads-with-id-zero",
    "embedding",
    "token",
    "id 0 is taken as padding: its row has no gradient",
    source="`padding_idx=0` by default in many configs whose id 0 is a token",
)
def embedding_pads_with_id_zero() -> Iterator[None]:
    def wrong(self, ids):
        x = F.embedding(ids, self.weight, padding_idx=0)
        return x if self.scale == 1.0 else x * self.scale

    with replaced(f"{ENDS}:TokenEmbedding.forward", lambda _: wrong):
        yield


@mutant(
    "embedding-lacks-the-last-id",
    "embedding",
    "token",
    "ids are clamped one too low: the last one has its neighbour's row",
    source="vocabularies padded or cut by one on conversion",
)
def embedding_lacks_the_last_id() -> Iterator[None]:
    def wrong(forward):
        return lambda self, ids: forward(self, ids.clamp(max=max(0, len(self.weight) - 2)))

    with replaced(f"{ENDS}:TokenEmbedding.forward", wrong):
        yield


@mutant(
    "embedding-knows-its-place",
    "embedding",
    "token",
    "a first token's vector is another one, which a cached forward has at every token",
    source="absolute positions added by the embedding",
)
def embedding_knows_its_place() -> Iterator[None]:
    def wrong(forward):
        def placed(self, ids):
            x = forward(self, ids)
            return x + 0.1 * torch.arange(ids.shape[1], dtype=x.dtype)[None, :, None]

        return placed

    with replaced(f"{ENDS}:TokenEmbedding.forward", wrong):
        yield


@mutant(
    "embedding-gradient-of-the-last-token",
    "embedding",
    "token",
    "of an id that comes twice, one token's gradient replaces the other's",
    source="scatter in place of scatter-add in an embedding's backward",
)
def embedding_gradient_of_the_last_token() -> Iterator[None]:
    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, ids):
            ctx.save_for_backward(ids)
            ctx.shape = weight.shape
            return weight[ids]

        @staticmethod
        def backward(ctx, gradient):
            (ids,) = ctx.saved_tensors
            found = gradient.new_zeros(ctx.shape)
            found[ids] = gradient
            return found, None

    def wrong(self, ids):
        return Rows.apply(self.weight, ids) * self.scale

    with replaced(f"{ENDS}:TokenEmbedding.forward", lambda _: wrong):
        yield


@mutant(
    "head-caps-before-it-scales",
    "head",
    "linear",
    "scale * cap * tanh(W h / cap): logits beyond the cap",
    source="order of logit scale and soft cap mixed up, Gemma and Grok ports",
)
def head_caps_before_it_scales() -> Iterator[None]:
    def wrong(self, hidden):
        logits = self.projection(hidden)
        logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        return logits * self.scale

    with replaced(f"{ENDS}:LinearHead.forward", lambda _: wrong):
        yield


@mutant(
    "head-clamps-at-its-cap",
    "head",
    "linear",
    "logits are cut at the cap, where they should bend",
    source="soft caps ported as clamps",
)
def head_clamps_at_its_cap() -> Iterator[None]:
    def wrong(self, hidden):
        logits = self.projection(hidden) * self.scale
        return logits if self.cap is None else logits.clamp(-self.cap, self.cap)

    with replaced(f"{ENDS}:LinearHead.forward", lambda _: wrong):
        yield


@mutant(
    "head-forgets-its-scale",
    "head",
    "linear",
    "logits are not scaled",
    source="muP's and Cohere's logit scale unread",
)
def head_forgets_its_scale() -> Iterator[None]:
    def wrong(self, hidden):
        logits = self.projection(hidden)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    with replaced(f"{ENDS}:LinearHead.forward", lambda _: wrong):
        yield


@mutant(
    "head-centres-over-tokens",
    "head",
    "linear",
    "the largest logit is taken off, of all tokens at once",
    source="stabilised softmaxes whose maximum lacks its dimension",
)
def head_centres_over_tokens() -> Iterator[None]:
    def wrong(forward):
        def centred(self, hidden):
            logits = forward(self, hidden)
            return logits - logits.max().detach()

        return centred

    with replaced(f"{ENDS}:LinearHead.forward", wrong):
        yield


@mutant(
    "head-tied-to-nothing",
    "head",
    "linear",
    "a tied head has a matrix of its own",
    source="`tie_word_embeddings` unread: heads left at their initial values",
)
def head_tied_to_nothing() -> Iterator[None]:
    def wrong(tensors):
        def apart(self, site):
            for each in tensors(self, site):
                yield attrs.evolve(each, same_as=None)

        return apart

    with replaced("composeformer_dense.configs.ends:LinearHead.tensors", wrong):
        yield


@mutant(
    "head-tied-to-a-copy",
    "head",
    "linear",
    "a tied head starts as the embedding's table and is a parameter of its own",
    source="ties lost by wrapping, sharding or `to_empty`; Megatron-Bridge#919",
)
def head_tied_to_a_copy() -> Iterator[None]:
    def wrong(forward):
        def copied(self, hidden):
            if not hasattr(self, "copy"):
                self.copy = nn.Parameter(self.projection.matrix().detach().clone())
            logits = hidden.to(self.copy.dtype) @ self.copy.T * self.scale
            return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

        return copied

    with replaced(f"{ENDS}:LinearHead.forward", wrong):
        yield
