"""Bugs of number formats, thought of without a look at the laws: attention that computes in bfloat16 what it promises
to compute in float32, formats that say another dtype than the one that travels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import torch
from museum_kit import mutant, replaced

UNSEEN = "thought of without the laws"
GQA = "composeformer_dense.attention:Attention"
MLA = "composeformer_attention_mla.reference:LatentAttention"
ABSORBED = "composeformer_attention_mla.absorbed:Absorbed"


@contextmanager
def _softmax(wrong) -> Iterator[None]:
    """Within, softmax is `wrong(softmax, scores, dim)`."""
    softmax = torch.Tensor.softmax
    torch.Tensor.softmax = lambda scores, dim: wrong(softmax, scores, dim)
    try:
        yield
    finally:
        torch.Tensor.softmax = softmax


def _in(wrong):
    """An attention core with another softmax where queries are in bfloat16."""

    def made(attend):
        def narrow(self, q, *given):
            if q.dtype != torch.bfloat16:
                return attend(self, q, *given)
            with _softmax(wrong):
                return attend(self, q, *given)

        return narrow

    return made


def _weights(softmax, scores, dim):
    return softmax(scores.bfloat16(), dim).to(scores.dtype)


def _scores(softmax, scores, dim):
    return softmax(scores.bfloat16().to(scores.dtype), dim)


@mutant(
    "weights-in-bfloat16", "mixer", "gqa", "the softmax is taken in the dtype of its queries", source=UNSEEN
)
def weights_in_bfloat16() -> Iterator[None]:
    with replaced(f"{GQA}.attend", _in(_weights)):
        yield


@mutant(
    "latent-weights-in-bfloat16",
    "mixer",
    "mla",
    "the softmax is taken in the dtype of its queries",
    source=UNSEEN,
    by="mixer.even",
)
def latent_weights_in_bfloat16() -> Iterator[None]:
    with replaced(f"{MLA}.attend", _in(_weights)):
        yield


@mutant(
    "absorbed-weights-in-bfloat16",
    "mixer",
    "mla",
    "the softmax is taken in the dtype of its queries",
    source=UNSEEN,
    implementation="absorbed",
    by="mixer.even",
)
def absorbed_weights_in_bfloat16() -> Iterator[None]:
    with replaced(f"{ABSORBED}.attend", _in(_weights)):
        yield


@mutant(
    "scores-in-bfloat16",
    "mixer",
    "gqa",
    "scores are rounded to the dtype of their queries before the softmax",
    source=UNSEEN,
)
def scores_in_bfloat16() -> Iterator[None]:
    with replaced(f"{GQA}.attend", _in(_scores)):
        yield


@mutant(
    "gradients-travel-narrow-on-paper",
    "precision",
    "bf16",
    "gradients of fp32 masters are told to be reduced in bfloat16",
    source=UNSEEN,
)
def gradients_travel_narrow_on_paper() -> Iterator[None]:
    def wrong(form):
        return lambda self, *given: attrs.evolve(form(self, *given), gradient="bfloat16")

    with replaced("composeformer_dense.configs.precision:BF16.format", wrong):
        yield


@mutant(
    "sensitive-weights-travel-narrow-on-paper",
    "precision",
    "bf16",
    "what is computed in fp32 is told to be gathered in bfloat16",
    source=UNSEEN,
    by="precision.travels",
)
def sensitive_weights_travel_narrow_on_paper() -> Iterator[None]:
    def wrong(form):
        return lambda self, *given: attrs.evolve(form(self, *given), gather="bfloat16")

    with replaced("composeformer_dense.configs.precision:BF16.format", wrong):
        yield


@mutant(
    "blocks-are-gathered-in-bfloat16-on-paper",
    "precision",
    "fp8-block",
    "masters are told to be gathered in bfloat16, and are quantised from fp32",
    source=UNSEEN,
    by="precision.travels",
)
def blocks_are_gathered_in_bfloat16_on_paper() -> Iterator[None]:
    def wrong(form):
        def narrow(self, *given):
            found = form(self, *given)
            return attrs.evolve(found, gather="bfloat16") if found.gather == "float32" else found

        return narrow

    with replaced("composeformer_fp8.configs.scaled:Scaled.format", wrong):
        yield


@mutant(
    "embedding-scale-in-bfloat16",
    "embedding",
    "token",
    "the scale of the embedding is a number of bfloat16 whatever the model is in",
    source="Gemma, whose released code rounds it so, and ports of it",
    by="embedding.rows",
)
def embedding_scale_in_bfloat16() -> Iterator[None]:
    def wrong(forward):
        def rounded(self, ids):
            scale = self.scale
            self.scale = float(torch.tensor(scale).bfloat16())
            try:
                return forward(self, ids)
            finally:
                self.scale = scale

        return rounded

    with replaced("composeformer_dense.ends:TokenEmbedding.forward", wrong):
        yield


@mutant(
    "gradients-of-rows-round-twice",
    "comm",
    "local",
    "weights are narrowed before they multiply the gradients of rows",
    source=UNSEEN,
    by="comm.wide-sums",
)
def gradients_of_rows_round_twice() -> Iterator[None]:
    def wrong(backward):
        @staticmethod
        def narrow(ctx, gradient):
            _, *rest = backward(ctx, gradient)
            rows, order, places, weights = ctx.saved_tensors
            of_token = gradient.index_select(0, order // places.shape[1]).to(rows.dtype)
            return of_token * weights.reshape(-1)[order][:, None].to(rows.dtype), *rest

        return narrow

    with replaced("composeformer_comm.sorting:_Gather.backward", wrong):
        yield
