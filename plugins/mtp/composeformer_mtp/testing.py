"""A hypothesis strategy of tiny `mtp` tables, without the parts they take. Nothing else imports it."""

from typing import Any

from hypothesis import strategies as st


def predictors() -> st.SearchStrategy[dict[str, Any]]:
    """`mtp`, of one to three depths."""
    fixed = {"kind": st.just("mtp"), "depth": st.integers(1, 3)}
    return st.fixed_dictionaries(fixed, optional={"loss_weight": st.sampled_from([0.3, 0.0, 1.0])})
