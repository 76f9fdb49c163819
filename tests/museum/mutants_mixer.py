"""Bugs of attention: what a token sees, and with which weights."""

from collections.abc import Iterator
from typing import Any

import torch
from museum_kit import mutant, replaced
from torch import nn

GQA = "composeformer_dense.attention:Attention"
MLA = "composeformer_attention_mla.reference:LatentAttention"


@mutant(
    "mask-lets-the-next-token-in",
    "mixer",
    "gqa",
    "a causal mask that is one too wide",
    source="off by one in many masks",
)
def mask_lets_the_next_token_in() -> Iterator[None]:
    def wrong(attend: Any) -> Any:
        def wider(self: Any, q: Any, k: Any, v: Any, seen: Any) -> Any:
            tokens, keys = q.shape[1], k.shape[1]
            if seen is None and tokens > 1:
                seen = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens + 1)[None]
            return attend(self, q, k, v, seen)

        return wider

    with replaced(f"{GQA}.attend", wrong):
        yield


@mutant(
    "rows-share-a-softmax",
    "mixer",
    "gqa",
    "keys are centred by a mean that spans the batch",
    source="statistics over a batch in place of a row; softmax over dim 0",
)
def rows_share_a_softmax() -> Iterator[None]:
    def wrong(attend: Any) -> Any:
        def shared(self: Any, q: Any, k: Any, v: Any, seen: Any) -> Any:
            return attend(self, q, k - k.mean(0, keepdim=True), v, seen)

        return shared

    with replaced(f"{GQA}.attend", wrong):
        yield


@mutant(
    "padding-is-multiplied-by-zero",
    "mixer",
    "gqa",
    "padding is blanked by a product: NaN times zero is NaN",
    source="pitfalls 2, row 25; flashinfer issue 941",
)
def padding_is_multiplied_by_zero() -> Iterator[None]:
    def wrong(heads: Any) -> Any:
        def multiplied(self: Any, x: Any, batch: Any) -> Any:
            if batch.valid is None:
                return heads(self, x, batch)
            return heads(self, x * batch.valid[:, :, None], batch._replace(valid=None))

        return multiplied

    with replaced(f"{GQA}.heads", wrong):
        yield


@mutant(
    "padding-is-seen",
    "mixer",
    "mla",
    "padding is a key like any other",
    source="pitfalls 2, row 10; transformers issue 48256",
    by="mixer.padding",
)
def padding_is_seen() -> Iterator[None]:
    def wrong(own_keys: Any) -> Any:
        return lambda batch, window=None: own_keys(batch._replace(valid=None), window)

    with replaced("composeformer_attention_mla.reference:own_keys", wrong):
        yield


@mutant(
    "documents-are-ignored",
    "mixer",
    "gqa",
    "positions start anew in each packed document, and the mask spans them all",
    source="pitfalls 2, row 24; transformers PR 46634, axolotl PR 3796, nanoVLM PR 204",
)
def documents_are_ignored() -> Iterator[None]:
    def wrong(own_keys: Any) -> Any:
        return lambda batch, window=None: own_keys(batch._replace(documents=None), window)

    with replaced("composeformer_dense.attention:own_keys", wrong):
        yield


def _window(by: int) -> Any:
    def wrong(visible: Any) -> Any:
        def moved(*args: Any, window: Any = None, **more: Any) -> Any:
            if len(args) > 4:
                args, window = args[:4], args[4]
            return visible(*args, window=None if window is None else max(window + by, 1), **more)

        return moved

    return wrong


@mutant(
    "window-is-one-too-short",
    "mixer",
    "gqa",
    "a window that does not count the token itself",
    source="transformers: sliding windows of window and window + 1 tokens, by model",
)
def window_is_one_too_short() -> Iterator[None]:
    with (
        replaced("composeformer.tensors:visible", _window(-1)),
        replaced("composeformer.cache:visible", _window(-1)),
    ):
        yield


@mutant(
    "window-is-one-too-long",
    "mixer",
    "mla",
    "a window that counts the token itself beside its own",
    source="transformers: sliding windows of window and window + 1 tokens, by model",
)
def window_is_one_too_long() -> Iterator[None]:
    with replaced("composeformer.tensors:visible", _window(1)):
        yield


@mutant(
    "keys-grow-with-their-place",
    "mixer",
    "gqa",
    "a key counts for more the later it stands, whatever its position",
    source="biases of distance taken from a token's place in the row",
)
def keys_grow_with_their_place() -> Iterator[None]:
    def wrong(attend: Any) -> Any:
        def nearer(self: Any, q: Any, k: Any, v: Any, seen: Any) -> Any:
            places = torch.linspace(1, 1.1, k.shape[1]).to(k.dtype)
            return attend(self, q, k * places[:, None, None], v, seen)

        return nearer

    with replaced(f"{GQA}.attend", wrong):
        yield


@mutant(
    "keys-are-not-rotated",
    "mixer",
    "gqa",
    "queries turn with their positions, keys do not",
    source="pitfalls 2, row 18",
)
def keys_are_not_rotated() -> Iterator[None]:
    def wrong(heads: Any) -> Any:
        def unrotated(self: Any, x: Any, batch: Any) -> Any:
            q, k, v = heads(self, x, batch)
            table = batch.tables[self.position.key]
            return q, self.position.rotate(k, table, inverse=True).to(k.dtype), v

        return unrotated

    with replaced(f"{GQA}.heads", wrong):
        yield


@mutant(
    "values-are-rotated",
    "mixer",
    "gqa",
    "values turn with their positions, like keys",
    source="a rotary embedding applied to a fused qkv tensor, GPT-NeoX forks",
)
def values_are_rotated() -> Iterator[None]:
    def wrong(heads: Any) -> Any:
        def turned(self: Any, x: Any, batch: Any) -> Any:
            q, k, v = heads(self, x, batch)
            return q, k, self.position.rotate(v, batch.tables[self.position.key]).to(v.dtype)

        return turned

    with replaced(f"{GQA}.heads", wrong):
        yield


@mutant(
    "cap-is-not-divided-by",
    "mixer",
    "gqa",
    "a soft cap that multiplies by the cap, and does not divide by it before",
    source="Gemma 2 ports: cap * tanh(scores)",
)
def cap_is_not_divided_by() -> Iterator[None]:
    def wrong(attend: Any) -> Any:
        def undivided(self: Any, q: Any, k: Any, v: Any, seen: Any) -> Any:
            return attend(self, q if self.cap is None else q * self.cap, k, v, seen)

        return undivided

    with replaced(f"{GQA}.attend", wrong):
        yield


@mutant(
    "sinks-give-back-their-weight",
    "mixer",
    "gqa",
    "weights are normalised anew once the sink is dropped, so that it takes none",
    source="gpt-oss ports",
)
def sinks_give_back_their_weight() -> Iterator[None]:
    def wrong(attend: Any) -> Any:
        def without(self: Any, q: Any, k: Any, v: Any, seen: Any) -> Any:
            sinks, self.sinks = self.sinks, None
            try:
                return attend(self, q, k, v, seen)
            finally:
                self.sinks = sinks

        return without

    with replaced(f"{GQA}.attend", wrong):
        yield


@mutant(
    "cap-before-the-scale",
    "mixer",
    "gqa",
    "a soft cap on products that are not divided by the root of the head's width yet",
    source="the place of Gemma 2's cap in ports of fused kernels",
)
def cap_before_the_scale() -> Iterator[None]:
    def wrong(attend: Any) -> Any:
        def early(self: Any, q: Any, k: Any, v: Any, seen: Any) -> Any:
            cap = self.cap
            if cap is None:
                return attend(self, q, k, v, seen)
            self.cap = cap * self.head_dim**-0.5
            try:
                return attend(self, q, k, v, seen)
            finally:
                self.cap = cap

        return early

    with replaced(f"{GQA}.attend", wrong):
        yield


@mutant(
    "scale-of-the-unrotated-width",
    "mixer",
    "mla",
    "scores are divided by the root of the width without a position, in every implementation alike",
    source="pitfalls 4, detail 2; scales of MLA ports",
)
def scale_of_the_unrotated_width() -> Iterator[None]:
    def wrong(_: Any) -> Any:
        return property(lambda self: self.qk_nope_head_dim**-0.5)

    with replaced("composeformer_attention_mla.config:MLA.scale", wrong):
        yield


@mutant(
    "rotary-key-is-normalised",
    "mixer",
    "mla",
    "the norm of the latent is taken over the rotary key, too",
    source="a norm over the whole of kv_a's output in MLA ports",
    by="mixer.latent",
)
def rotary_key_is_normalised() -> Iterator[None]:
    def wrong(latents: Any) -> Any:
        def normalised(self: Any, x: Any, rotary: Any) -> Any:
            latent, key = latents(self, x, rotary)
            return latent, key * (key.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

        return normalised

    with replaced(f"{MLA}.latents", wrong):
        yield


@mutant(
    "norms-follow-the-rotation",
    "mixer",
    "gqa",
    "queries and keys are normalised after they turn, with weights for each feature",
    source="the place of QK-norm in Qwen 3 and Gemma 3 ports",
    by="mixer.relative",
)
def norms_follow_the_rotation() -> Iterator[None]:
    def wrong(heads: Any) -> Any:
        def after(self: Any, x: Any, batch: Any) -> Any:
            norms = self.q_norm, self.k_norm
            if norms[0] is None:
                return heads(self, x, batch)
            self._modules["q_norm"] = self._modules["k_norm"] = nn.Identity()
            try:
                q, k, v = heads(self, x, batch)
            finally:
                self._modules["q_norm"], self._modules["k_norm"] = norms
            return norms[0](q), norms[1](k), v

        return after

    with replaced(f"{GQA}.heads", wrong):
        yield
