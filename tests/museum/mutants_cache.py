"""Bugs of mixers' caches: what is kept, forgotten, moved and masked between calls."""

from collections.abc import Iterator
from typing import Any

import torch
from museum_kit import mutant, replaced

CACHE = "composeformer.cache:TokenCache"
GQA = "composeformer_dense.attention:Attention"


@mutant(
    "chunk-is-aligned-to-the-first-key",
    "mixer",
    "gqa",
    "a chunk after cached tokens is masked as if its first query stood at the first key",
    source="scaled_dot_product_attention(is_causal=True) aligns top left; pytorch issue 108108",
    implementation="sdpa",
)
def chunk_is_aligned_to_the_first_key() -> Iterator[None]:
    def wrong(attend: Any) -> Any:
        def aligned(self: Any, q: Any, k: Any, v: Any, seen: Any) -> Any:
            if seen is not None and q.shape[1] > 1:
                seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()[None]
            return attend(self, q, k, v, seen)

        return aligned

    with replaced("composeformer_dense.sdpa:SDPA.attend", wrong):
        yield


@mutant(
    "chunk-starts-at-position-zero",
    "mixer",
    "mla",
    "every call counts its positions from zero",
    source="pitfalls 2, row 25; transformers: cache_position left out",
    by="mixer.cached",
)
def chunk_starts_at_position_zero() -> Iterator[None]:
    def wrong(rotary: Any) -> Any:
        return lambda self, positions: rotary(self, positions - positions[:, :1])

    with replaced("composeformer.decoder:Model.rotary", wrong):
        yield


@mutant(
    "ring-keeps-its-window-alone",
    "mixer",
    "gqa",
    "a ring of `window` slots: what a rolled back token has overwritten is gone",
    source="trials, walk 1; pitfalls 2, row 25: speculation past a window",
    by="mixer.cached",
)
def ring_keeps_its_window_alone() -> Iterator[None]:
    def wrong(init: Any) -> Any:
        def narrow(self: Any, *args: Any, max_rollback: int = 0, **more: Any) -> None:
            init(self, *args, max_rollback=0, **more)
            self.max_rollback = max_rollback

        return narrow

    with replaced(f"{CACHE}.__init__", wrong):
        yield


@mutant(
    "rollback-is-the-longest-for-all",
    "mixer",
    "mla",
    "all rows forget as many tokens as the one that forgets most",
    source="speculative decoding of a batch by its least acceptance; vllm and sglang threads",
)
def rollback_is_the_longest_for_all() -> Iterator[None]:
    def wrong(rollback: Any) -> Any:
        def alike(self: Any, counts: Any) -> None:
            rollback(self, torch.minimum(counts.max(), self.lengths))

        return alike

    with replaced(f"{CACHE}.rollback", wrong):
        yield


@mutant(
    "reorder-leaves-the-lengths",
    "mixer",
    "gqa",
    "beams swap their keys and values and keep their own lengths",
    source="transformers: reorder_cache without the attention mask",
)
def reorder_leaves_the_lengths() -> Iterator[None]:
    def wrong(reorder: Any) -> Any:
        def partly(self: Any, index: Any) -> None:
            kept = torch.arange(len(index)) % len(self.lengths)
            lengths, longest = self.lengths[kept], self._longest[kept]
            reorder(self, index)
            self.lengths, self._longest = lengths, longest
            self._settle()

        return partly

    with replaced(f"{CACHE}.reorder", wrong):
        yield


@mutant(
    "cached-documents-are-ignored",
    "mixer",
    "gqa",
    "packed documents are kept apart in a forward, and not in a cache",
    source="pitfalls 2, row 24",
)
def cached_documents_are_ignored() -> Iterator[None]:
    def wrong(visible: Any) -> Any:
        return lambda q, k, own, others, *args, **more: visible(q, k, None, None, *args, **more)

    with replaced("composeformer.cache:visible", wrong):
        yield


@mutant(
    "padding-takes-a-slot",
    "mixer",
    "gqa",
    "padding moves a row on, so that a window holds fewer tokens than it says",
    source="pitfalls 2, row 25; transformers issue 48256",
)
def padding_takes_a_slot() -> Iterator[None]:
    def wrong(order: Any) -> Any:
        def counted(self: Any, valid: Any, tokens: int) -> Any:
            return order(self, None if valid is None else torch.ones_like(valid), tokens)

        return counted

    with replaced(f"{CACHE}._order", wrong):
        yield


@mutant(
    "mask-follows-positions",
    "mixer",
    "gqa",
    "a token sees those of smaller position, though positions only rotate",
    source="masks built from position ids; llama.cpp, transformers' packed masks",
)
def mask_follows_positions() -> Iterator[None]:
    def wrong(own_keys: Any) -> Any:
        def by_position(batch: Any, window: int | None = None) -> Any:
            if batch.documents is not None or batch.valid is not None or window is not None:
                return own_keys(batch, window)
            ordered = batch.positions[:, :, None] >= batch.positions[:, None]
            return ordered | torch.eye(ordered.shape[1], dtype=torch.bool)

        return by_position

    with replaced("composeformer_dense.attention:own_keys", wrong):
        yield


@mutant(
    "mixer-remembers-its-cache",
    "mixer",
    "gqa",
    "the first cache that a mixer is given is kept on it, and used ever after",
    source="DeepSeek-V3 inference/model.py: caches are buffers of the module",
)
def mixer_remembers_its_cache() -> Iterator[None]:
    def wrong(forward: Any) -> Any:
        def remembering(self: Any, x: Any, batch: Any, cache: Any = None) -> Any:
            if cache is not None:
                cache = self.__dict__.setdefault("held", cache)
            return forward(self, x, batch, cache)

        return remembering

    with replaced(f"{GQA}.forward", wrong):
        yield


@mutant(
    "unseen-scores-are-merely-small",
    "mixer",
    "gqa",
    "a mask that adds -1e4 to what may not be seen, which is not enough where a slot holds garbage",
    source="pitfalls 2, row 25: flashinfer issue 941; additive masks in fp16 ports",
)
def unseen_scores_are_merely_small() -> Iterator[None]:
    def wrong(attend: Any) -> Any:
        def added(self: Any, q: Any, k: Any, v: Any, seen: Any) -> Any:
            if seen is None or self.cap is not None or self.sinks is not None:
                return attend(self, q, k, v, seen)
            kind = torch.promote_types(q.dtype, torch.float32)
            grouped = q.to(kind).unflatten(2, (k.shape[2], -1))
            scores = torch.einsum("btkgd,bskd->bkgts", grouped, k.to(kind)) * self.head_dim**-0.5
            weights = (scores - 1e4 * ~seen[:, None, None]).softmax(-1)
            return torch.einsum("bkgts,bskd->btkgd", weights, v.to(kind)).flatten(2, 3).to(q.dtype)

        return added

    with replaced(f"{GQA}.attend", wrong):
        yield


@mutant(
    "cache-is-in-float32",
    "mixer",
    "gqa",
    "a cache in float32 under a model in another dtype: its bytes are not those that `cost` tells",
    source="pitfalls 1, row 21; torch.zeros without a dtype",
)
def cache_is_in_float32() -> Iterator[None]:
    def wrong(made: Any) -> Any:
        return lambda *args, dtype, **more: made(*args, dtype=torch.float32, **more)

    with replaced("composeformer_dense.attention:TokenCache", wrong):
        yield
