"""Hypothesis strategies of tiny tables for the dense parts, without the parts they take. Nothing else imports them."""

from typing import Any

from hypothesis import strategies as st

Table = dict[str, Any]
Tables = st.SearchStrategy[Table]

LAYOUTS = st.sampled_from(["half-split", "interleaved"])
THETAS = st.sampled_from([10000.0, 100.0, 2.0, 1e6])
FACTORS = st.sampled_from([1.0, 2.0, 4.0, 40.0]) | st.floats(1.0, 64.0)
# Contexts that a model was trained for, from those in which few pairs, or none, turn once.
ORIGINALS = st.integers(8, 4096) | st.integers(1, 16)
# What scales YaRN's tables: the factor, DeepSeek's ratio of two, one of the two, a number.
SCALES: list[Table] = [
    {},
    {"mscale": 1.0, "mscale_all_dim": 0.5},
    {"mscale": 0.707, "mscale_all_dim": 0.707},
    {"mscale": 0.707},
    {"mscale": 0.707, "mscale_all_dim": 0.0},
    {"attention_factor": 1.25},
    {"attention_factor": 0.8, "mscale": 1.0, "mscale_all_dim": 0.5},
]
EPSILONS = st.sampled_from([1e-6, 1e-5, 1e-8, 0.1])
# Fractions of a width that is a multiple of four which leave an even number of features to rotate.
FRACTIONS = st.sampled_from([1.0, 0.5])


@st.composite
def attentions(draw: st.DrawFn) -> Table:
    """`gqa`, for any hidden size that is a multiple of 4; heads are of 4 or 8 features."""
    kv_heads = draw(st.sampled_from([1, 2, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3]))
    switches = {name: st.booleans() for name in ("qkv_bias", "o_bias", "sinks")}
    sizes = {"window": st.integers(1, 6), "cap": st.sampled_from([1.0, 2.0, 30.0])}
    table: Table = {
        "kind": "gqa",
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([4, 8])),
    }
    return table | draw(st.fixed_dictionaries({}, optional={**switches, **sizes}))


def feed_forwards() -> Tables:
    """`swiglu`, of any width."""
    fixed = {
        "kind": st.just("swiglu"),
        "intermediate_size": st.integers(1, 24),
        "activation": st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu2"]),
    }
    more = {"gated": st.booleans(), "bias": st.booleans()}
    return st.fixed_dictionaries(fixed, optional=more)


def rms_norms() -> Tables:
    """`rmsnorm`."""
    return st.fixed_dictionaries({"kind": st.just("rmsnorm")}, optional={"eps": EPSILONS})


def layer_norms() -> Tables:
    """`layernorm`."""
    more = {"eps": EPSILONS, "bias": st.booleans()}
    return st.fixed_dictionaries({"kind": st.just("layernorm")}, optional=more)


def _positions(kind: str, **required: st.SearchStrategy[Any]) -> Tables:
    more = {"theta": THETAS, "layout": LAYOUTS, "fraction": FRACTIONS}
    return st.fixed_dictionaries({"kind": st.just(kind), **required}, optional=more)


def ropes() -> Tables:
    """`rope`, for widths that are multiples of four, like all positions here."""
    return _positions("rope")


def linear_ropes() -> Tables:
    """`linear`."""
    return _positions("linear", factor=FACTORS)


@st.composite
def llama3_ropes(draw: st.DrawFn) -> Table:
    """`llama3`."""
    table = draw(_positions("llama3", factor=FACTORS, original_max_position_embeddings=ORIGINALS))
    low = draw(st.sampled_from([0.5, 1.0, 2.0]))
    bands = {"low_freq_factor": low, "high_freq_factor": low * draw(st.sampled_from([1.5, 4.0, 8.0]))}
    return table | draw(st.sampled_from([{}, bands]))


@st.composite
def yarn_ropes(draw: st.DrawFn) -> Table:
    """`yarn`."""
    table = draw(_positions("yarn", factor=FACTORS, original_max_position_embeddings=ORIGINALS))
    slow = draw(st.sampled_from([0.5, 1.0, 2.0]))
    betas = {"beta_slow": slow, "beta_fast": slow * draw(st.sampled_from([1.0, 4.0, 32.0]))}
    rounded: list[Table] = [{}, {"truncate": False}]
    return (
        table
        | draw(st.sampled_from([{}, betas]))
        | draw(st.sampled_from(SCALES))
        | draw(st.sampled_from(rounded))
    )


def embeddings() -> Tables:
    """`token`."""
    return st.fixed_dictionaries({"kind": st.just("token")}, optional={"scale": st.sampled_from([3.3, 0.5])})


def heads() -> Tables:
    """`linear`, the head."""
    more = {"scale": st.sampled_from([2.7, 0.25]), "cap": st.sampled_from([1.0, 30.0])}
    return st.fixed_dictionaries({"kind": st.just("linear")}, optional=more)
