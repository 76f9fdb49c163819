"""Tiny tables of `gated-delta`, for the laws of its slot. Needs hypothesis; nothing else of the plugin imports it."""

from typing import Any

from hypothesis import strategies as st


def tables() -> st.SearchStrategy[dict[str, Any]]:
    """Few and narrow heads, and chunks of a few tokens, so that short rows have several.

    Values have three features or more: of one or two a norm leaves the signs, and gradients that are all rounding.
    """
    return st.fixed_dictionaries(
        {
            "kind": st.just("gated-delta"),
            "num_heads": st.integers(1, 3),
            "k_head_dim": st.integers(2, 5),
            "v_head_dim": st.integers(3, 6),
        },
        optional={"chunk_size": st.integers(1, 6)},
    )
