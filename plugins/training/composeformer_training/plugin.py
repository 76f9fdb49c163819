"""Registers the training parts. Imports no torch: modules are named, and loaded when a run begins."""

from collections.abc import Iterable

from composeformer.contracts import Component, Facts, Implementation
from composeformer.hookspecs import hookimpl
from composeformer_training.config import AdamW, NextToken


def fused_needs(facts: Facts) -> str | None:
    """Fused kernels round differently from the formula; they are taken when asked for by name."""
    return None if facts.device == "cuda" else f"its kernels are for cuda, this model is on {facts.device}"


COMPONENTS = (
    Component(
        "objective",
        "next-token",
        NextToken,
        (Implementation("reference", "composeformer_training.next_token:NextTokenLoss"),),
        summary="cross-entropy of the next token",
        default=True,
    ),
    Component(
        "optimizer",
        "adamw",
        AdamW,
        (
            Implementation("reference", "composeformer_training.adamw:make"),
            Implementation("fused", "composeformer_training.adamw:make_fused", needs=fused_needs),
        ),
        summary="Adam with decoupled weight decay, on matrices alone",
        default=True,
    ),
)


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS
