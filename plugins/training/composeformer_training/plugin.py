"""Registers the training parts. Imports no torch: modules are named, and loaded when a run begins."""

from collections.abc import Iterable

from composeformer.contracts import Component, Facts, Implementation
from composeformer.hookspecs import hookimpl
from composeformer_training.config import AdamW, NextToken


def reference_needs(facts: Facts) -> str | None:
    """Adam divides by the root of a squared gradient plus eps; in half precision both are 0 long before."""
    found = _half(facts)
    if found is None:
        return None
    return f"float16, as {found} is, holds neither squared gradients nor eps; train in bfloat16 or float32"


def fused_needs(facts: Facts) -> str | None:
    """Fused kernels round differently from the formula; they are taken when asked for by name."""
    if _half(facts) is not None:
        return reference_needs(facts)
    formats = facts.site.spec.formats
    if any(form.moment != form.storage for name, form in formats.tensors.items() if formats.trains(name)):
        return "its kernels keep moments in the weights' dtype, and the precision policy has another"
    return None if facts.device == "cuda" else f"its kernels are for cuda, this model is on {facts.device}"


def _half(facts: Facts) -> str | None:
    """The first tensor whose moments are in half precision, be it by a rule of its own."""
    formats = facts.site.spec.formats
    named = (name for name, form in formats.tensors.items() if form.moment == "float16" and formats.trains(name))
    return next(named, None)


COMPONENTS = (
    Component(
        "objective",
        "next-token",
        NextToken,
        (Implementation("reference", "composeformer_training.next_token:NextTokenLoss"),),
        summary="cross-entropy of the next token",
        claims=("next-token", "renamed", "shift"),
        default=True,
    ),
    Component(
        "optimizer",
        "adamw",
        AdamW,
        (
            Implementation("reference", "composeformer_training.adamw:make", needs=reference_needs),
            Implementation("fused", "composeformer_training.adamw:make_fused", needs=fused_needs),
        ),
        summary="Adam with decoupled weight decay, on matrices alone",
        claims=("each-alone", "elementwise", "still-at-zero", "moments", "scale-free", "adam"),
        default=True,
    ),
)


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS
