"""Hypothesis strategies of tables for latent attention, mixtures of experts, routers and predictors.

They are drawn by `specs`, which gives them what they refer to: positions, norms, routers, a layer's parts.
"""

from typing import Any

from hypothesis import strategies as st

Data = dict[str, Any]
Tables = st.SearchStrategy[Data]

# Every router drawn serves every mixture drawn: groups of two experts or more, and top_k within one of them.
EXPERTS = (4, 8)
LARGEST_TOP_K = 2


def latents() -> Tables:
    """`mla` without its parts, for any hidden size."""
    required: dict[str, st.SearchStrategy[Any]] = {
        "kind": st.just("mla"),
        "num_heads": st.sampled_from([1, 2]),
        "kv_lora_rank": st.integers(1, 8),
        "qk_nope_head_dim": st.integers(1, 8),
        "qk_rope_head_dim": st.sampled_from([4, 8]),
        "v_head_dim": st.integers(1, 8),
    }
    return st.fixed_dictionaries(
        required,
        optional={
            "q_lora_rank": st.integers(1, 8),
            "attention_bias": st.booleans(),
            "window": st.integers(1, 64),
        },
    )


@st.composite
def routers(draw: st.DrawFn) -> Data:
    """A router that serves any of `EXPERTS`."""
    top_k = draw(st.integers(1, LARGEST_TOP_K))
    groups = draw(st.sampled_from([1, 2]))
    shared: dict[str, st.SearchStrategy[Any]] = {
        "num_groups": st.just(groups),
        "group_score": st.sampled_from(["max", "top2"]),
        "routed_scaling_factor": st.floats(0.5, 4.0),
    }
    small = st.floats(0.0, 0.01)
    if draw(st.booleans()):
        balance = {"bias_update_speed": small, "sequence_balance_alpha": small, "normalize": st.booleans()}
        table = draw(st.fixed_dictionaries({"kind": st.just("sigmoid-bias")}, optional=shared | balance))
    else:
        balance = {"balance_alpha": small, "z_alpha": small}
        table = draw(st.fixed_dictionaries({"kind": st.just("softmax")}, optional=shared | balance))
        choices = [{}, {"normalize": True}, {"normalize": False}, {"softmax": "before"}, {"softmax": "after"}]
        table |= draw(st.sampled_from(choices))
    if "num_groups" in table:
        table |= draw(st.fixed_dictionaries({}, optional={"top_k_groups": st.integers(1, groups)}))
    return {**table, "top_k": top_k}


@st.composite
def mixtures(draw: st.DrawFn) -> Data:
    """`moe` without its router."""
    table: Data = {
        "kind": "moe",
        "num_experts": draw(st.sampled_from(EXPERTS)),
        "intermediate_size": draw(st.integers(1, 24)),
    }
    shared = draw(st.sampled_from([None, 0, 1, 2]))
    table |= {} if shared is None else {"num_shared_experts": shared}
    if shared and draw(st.booleans()):
        table["shared_intermediate_size"] = draw(st.integers(1, 24))
    return table


def refined_mixtures(name: str) -> Tables:
    """References to the mixture `name` with another width, or another router."""
    narrow = st.builds(lambda size: {"use": name, "intermediate_size": size}, st.integers(1, 24))
    return narrow | st.builds(lambda router: {"use": name, "router": _whole(router)}, routers())


def _whole(router: Data) -> Data:
    """With every field stated that must fit another, so that it can be merged with any of its kind."""
    before = {"softmax": "before"} if router["kind"] == "softmax" else {}
    return {**before, "normalize": True, "num_groups": 1, "top_k_groups": 1, **router}


def predictors() -> Tables:
    """`mtp` without its parts."""
    more = {"depth": st.integers(1, 2), "loss_weight": st.floats(0.0, 1.0)}
    return st.fixed_dictionaries({"kind": st.just("mtp")}, optional=more)
