"""Hypothesis strategies of tiny tables for the backends of several processes. Nothing else imports them."""

from typing import Any

from hypothesis import strategies as st

Tables = st.SearchStrategy[dict[str, Any]]

# On one, two or four ranks.
NODES = st.sampled_from([1, 2, 4])
FORMATS: dict[str, st.SearchStrategy[Any]] = {
    "dispatch_format": st.sampled_from(["activations", "bf16", "fp8"]),
    "combine_format": st.sampled_from(["activations", "bf16"]),
}


def collectives() -> Tables:
    """`collective`."""
    fixed = {"kind": st.just("collective"), "copies": st.sampled_from(["expert", "rank"])}
    return st.fixed_dictionaries(fixed, optional={"ranks_per_node": NODES} | FORMATS)


def hierarchies() -> Tables:
    """`hierarchical`."""
    return st.fixed_dictionaries({"kind": st.just("hierarchical"), "ranks_per_node": NODES}, optional=FORMATS)
