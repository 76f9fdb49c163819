"""Hypothesis strategies of tiny tables of mixtures and routers, without the parts they take. Nothing else imports them.

Every router drawn serves every mixture drawn: groups of two experts or more, and top_k within one of them.
"""

from typing import Any

from hypothesis import strategies as st

Table = dict[str, Any]
EXPERTS = (4, 8)
LARGEST_TOP_K = 2
# Weights of losses, large enough to be seen in gradients, or none.
ALPHAS = st.sampled_from([0.25, 1.0, None, 0.0])


@st.composite
def mixtures(draw: st.DrawFn) -> Table:
    """`moe` without its router. Widths are multiples of 4 in half of the cases: some implementations want them."""
    width = draw(st.integers(1, 4)) * draw(st.sampled_from([4, 1]))
    table: Table = {"kind": "moe", "num_experts": draw(st.sampled_from(EXPERTS)), "intermediate_size": width}
    shared = draw(st.sampled_from([None, 0, 1, 2]))
    table |= {} if shared is None else {"num_shared_experts": shared}
    if shared and draw(st.booleans()):
        table["shared_intermediate_size"] = draw(st.integers(1, 16))
    return table


@st.composite
def _shared(draw: st.DrawFn) -> Table:
    """What all routers have."""
    groups = draw(st.sampled_from([1, 2, 2]))
    more = {"routed_scaling_factor": st.sampled_from([1.0, 2.5, 0.5])}
    table: Table = {
        "top_k": draw(st.integers(1, LARGEST_TOP_K)),
        **draw(st.fixed_dictionaries({}, optional=more)),
    }
    if groups > 1:
        table |= {
            "num_groups": groups,
            "top_k_groups": draw(st.integers(1, groups)),
            "group_score": draw(st.sampled_from(["max", "top2"])),
        }
    return table


@st.composite
def softmax_routers(draw: st.DrawFn) -> Table:
    """`softmax`."""
    choices = [{}, {"normalize": True}, {"normalize": False}, {"softmax": "before"}, {"softmax": "after"}]
    losses = {name: draw(ALPHAS) for name in ("balance_alpha", "z_alpha")}
    return {"kind": "softmax", **draw(_shared()), **draw(st.sampled_from(choices)), **_stated(losses)}


@st.composite
def sigmoid_routers(draw: st.DrawFn) -> Table:
    """`sigmoid-bias`."""
    more = {"bias_update_speed": st.sampled_from([0.001, 0.0, 0.25]), "normalize": st.booleans()}
    losses = {"sequence_balance_alpha": draw(ALPHAS)}
    optional = draw(st.fixed_dictionaries({}, optional=more))
    return {"kind": "sigmoid-bias", **draw(_shared()), **optional, **_stated(losses)}


def _stated(table: Table) -> Table:
    """Without what is absent."""
    return {name: value for name, value in table.items() if value is not None}
