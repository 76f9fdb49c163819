"""Registers the dense parts. Imports no torch: modules are named, and loaded when a model is built."""

from collections.abc import Iterable
from pathlib import Path

from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl
from composeformer_dense.configs.attention import GQA, sdpa_needs
from composeformer_dense.configs.ends import LinearHead, TokenEmbedding
from composeformer_dense.configs.ffn import SwiGLU
from composeformer_dense.configs.norm import LayerNorm, RMSNorm
from composeformer_dense.configs.position import LinearRope, Llama3Rope, NoPosition, Rope, YarnRope
from composeformer_dense.configs.precision import BF16, Full
from composeformer_dense.configs.residual import PreNorm

# Of everything that turns pairs of features; an extension says besides what it divides.
ROTARY = ("relative", "scores", "rotation", "geometric", "amplitude")


def reference(module: str) -> tuple[Implementation, ...]:
    return (Implementation("reference", f"composeformer_dense.{module}"),)


COMPONENTS = (
    Component(
        "mixer",
        "gqa",
        GQA,
        (
            Implementation("sdpa", "composeformer_dense.sdpa:SDPA", needs=sdpa_needs),
            *reference("attention:Attention"),
        ),
        summary="grouped-query attention: multi-head, multi-query and all between",
        claims=(
            "slope",
            "sees",
            "window",
            "set",
            "relative",
            "averages",
            "cap",
            "sinks",
            "dot-product",
            "even",
            "scores",
            "kept",
        ),
        strategy="composeformer_dense.testing:attentions",
    ),
    Component(
        "ffn",
        "swiglu",
        SwiGLU,
        reference("ffn:FeedForward"),
        summary="gated or plain feed-forward network",
        strategy="composeformer_dense.testing:feed_forwards",
        claims=("derivative", "formula", "kept"),
    ),
    Component(
        "norm",
        "rmsnorm",
        RMSNorm,
        reference("norms:RMSNorm"),
        summary="divides by the root mean square",
        claims=("scale", "unit", "gain"),
        strategy="composeformer_dense.testing:rms_norms",
    ),
    Component(
        "norm",
        "layernorm",
        LayerNorm,
        reference("norms:LayerNorm"),
        summary="mean 0 and variance 1",
        claims=("scale", "shift", "unit", "gain"),
        strategy="composeformer_dense.testing:layer_norms",
    ),
    Component(
        "position",
        "rope",
        Rope,
        reference("rotary:Rope"),
        summary="rotary positions",
        claims=ROTARY,
        strategy="composeformer_dense.testing:ropes",
    ),
    Component(
        "position",
        "linear",
        LinearRope,
        reference("rotary:LinearRope"),
        summary="rope, positions divided",
        claims=(*ROTARY, "interpolated"),
        strategy="composeformer_dense.testing:linear_ropes",
    ),
    Component(
        "position",
        "llama3",
        Llama3Rope,
        reference("rotary:Llama3Rope"),
        summary="rope, stretched as in Llama 3.1",
        claims=(*ROTARY, "by-wavelength"),
        strategy="composeformer_dense.testing:llama3_ropes",
    ),
    Component(
        "position",
        "yarn",
        YarnRope,
        reference("rotary:YarnRope"),
        summary="rope, stretched by parts",
        claims=(*ROTARY, "by-parts"),
        strategy="composeformer_dense.testing:yarn_ropes",
    ),
    Component(
        "position",
        "none",
        NoPosition,
        reference("rotary:NoPosition"),
        summary="no positions",
        claims=("still",),
    ),
    Component(
        "residual",
        "pre-norm",
        PreNorm,
        reference("residual:PreNorm"),
        summary="a norm before each sublayer",
        default=True,
        claims=("identity", "adds", "in-order", "normalises-first", "kept"),
    ),
    Component(
        "embedding",
        "token",
        TokenEmbedding,
        reference("ends:TokenEmbedding"),
        summary="a row per token",
        claims=("rows", "kept"),
        strategy="composeformer_dense.testing:embeddings",
        default=True,
    ),
    Component(
        "head",
        "linear",
        LinearHead,
        reference("ends:LinearHead"),
        summary="a logit per token",
        claims=("projection", "kept"),
        default=True,
        strategy="composeformer_dense.testing:heads",
    ),
    Component(
        "precision",
        "full",
        Full,
        reference("precision:FullPolicy"),
        summary="one dtype for everything",
        default=True,
        claims=("rows-alone", "powers-of-two", "repeats", "confined"),
    ),
    Component(
        "precision",
        "bf16",
        BF16,
        reference("precision:BF16Policy"),
        summary="linear maps in bfloat16",
        claims=("rows-alone", "powers-of-two", "repeats", "confined"),
    ),
)


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS


@hookimpl
def compose_dialects() -> Iterable[Path]:
    return sorted((Path(__file__).parent / "dialects").glob("*.toml"))
