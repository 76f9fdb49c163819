"""Bugs of attention: masks, caches, positions, scales."""

from collections.abc import Iterator

from museum_kit import mutant, replaced


@mutant(
    "mask-lets-the-next-token-in",
    "mixer",
    "gqa",
    "a causal mask that is one too wide",
    source="off by one in many masks",
)
def mask_lets_the_next_token_in() -> Iterator[None]:
    def wrong(attend):
        def wider(self, q, k, v, seen):
            import torch

            tokens, keys = q.shape[1], k.shape[1]
            if seen is None and tokens > 1:
                seen = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens + 1)[None]
            return attend(self, q, k, v, seen)

        return wider

    with replaced("composeformer_dense.attention:Attention.attend", wrong):
        yield
