"""Registers `moe` and its routers. Imports no torch: modules are named, and loaded when a model is built."""

from collections.abc import Iterable
from pathlib import Path

from composeformer.contracts import Component, Facts, Implementation
from composeformer.hookspecs import hookimpl
from composeformer_moe.config import MoE
from composeformer_moe.routers import SigmoidBias, Softmax

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def grouped_needs(facts: Facts) -> str | None:
    """PyTorch's grouped product takes no float64, and rows of whole 16 bytes. A policy with scales has its own, and
    declares that for experts: what reads matrices multiplies in higher precision.
    """
    formats = facts.site.spec.formats.tensors
    if any(formats[f"{facts.site.path}.{name}.weight"].block for name in ("gate", "up", "down")):
        return None
    if facts.dtype not in BYTES:
        return f"PyTorch's grouped product takes no {facts.dtype}"
    for name, size in (
        ("hidden_size", facts.site.width),
        ("intermediate_size", facts.config.intermediate_size),
    ):
        if size * BYTES[facts.dtype] % 16:
            return f"PyTorch's grouped product wants rows of whole 16 bytes; {name} is {size}"
    return None


# What both routers promise of their choice and weights.
ROUTERS = (
    "derivative",
    "single-precision",
    "groups",
    "exact-top-k",
    "scaling-factor",
    "normalised",
    "balance",
)

COMPONENTS = (
    Component(
        "ffn",
        "moe",
        MoE,
        (
            Implementation("grouped", "composeformer_moe.grouped:Grouped", needs=grouped_needs),
            Implementation("batched", "composeformer_moe.batched:Batched"),
            Implementation("reference", "composeformer_moe.reference:MixtureOfExperts"),
        ),
        summary="shared experts, and routed ones of which each token passes through a few",
        strategy="composeformer_moe.testing:mixtures",
        claims=("derivative", "loads", "renumbered", "experts-formula"),
    ),
    Component(
        "router",
        "softmax",
        Softmax,
        (Implementation("reference", "composeformer_moe.softmax:SoftmaxRouter"),),
        summary="softmax over experts, balanced by losses",
        strategy="composeformer_moe.testing:softmax_routers",
        claims=(*ROUTERS, "softmax", "shift", "z-loss"),
    ),
    Component(
        "router",
        "sigmoid-bias",
        SigmoidBias,
        (Implementation("reference", "composeformer_moe.sigmoid_bias:SigmoidBiasRouter"),),
        summary="sigmoids, balanced without a loss by a bias on the choice",
        strategy="composeformer_moe.testing:sigmoid_routers",
        claims=(*ROUTERS, "sigmoid", "bias-selects-only", "after-step"),
    ),
)


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS


@hookimpl
def compose_dialects() -> Iterable[Path]:
    return sorted((Path(__file__).parent / "dialects").glob("*.toml"))
