"""Tiny tables of `hash`, for the laws of its slot. Needs hypothesis; nothing else of the plugin imports it."""

from typing import Any

from hypothesis import strategies as st


def tables() -> st.SearchStrategy[dict[str, Any]]:
    """Routers that serve any mixture of two experts or more."""
    return st.fixed_dictionaries(
        {"kind": st.just("hash"), "top_k": st.integers(1, 2)},
        optional={"routed_scaling_factor": st.floats(0.5, 4.0), "seed": st.integers(0, 2**31)},
    )
