"""A hypothesis strategy of tiny `mla` tables, without the parts they take. Nothing else imports it."""

from typing import Any

from hypothesis import strategies as st


def latents() -> st.SearchStrategy[dict[str, Any]]:
    """`mla`, for any hidden size; the rotary width is a multiple of four.

    Latents are no narrower than four: the gradient of a norm of two features is what rounding leaves of a difference.
    """
    required: dict[str, st.SearchStrategy[Any]] = {
        "kind": st.just("mla"),
        "num_heads": st.sampled_from([1, 2, 3]),
        "kv_lora_rank": st.integers(4, 10),
        "qk_nope_head_dim": st.integers(1, 8),
        "qk_rope_head_dim": st.sampled_from([4, 8]),
        "v_head_dim": st.integers(1, 8) | st.integers(9, 17),  # beyond queries and keys, too
    }
    more: dict[str, st.SearchStrategy[Any]] = {
        "q_lora_rank": st.integers(4, 10),
        "attention_bias": st.booleans(),
        "window": st.integers(1, 6),
    }
    return st.fixed_dictionaries(required, optional=more)
