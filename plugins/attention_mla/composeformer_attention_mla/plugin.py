"""Registers `mla`. Imports no torch: modules are named, and loaded when a model is built.

`auto` takes the first that serves a phase: `expanded` in training and prefill, `absorbed` in decoding.
"""

from collections.abc import Iterable
from pathlib import Path

from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl
from composeformer_attention_mla.config import MLA

COMPONENTS = (
    Component(
        "mixer",
        "mla",
        MLA,
        (
            Implementation(
                "expanded", "composeformer_attention_mla.expanded:Expanded", phases=("train", "prefill")
            ),
            Implementation("absorbed", "composeformer_attention_mla.absorbed:Absorbed"),
            Implementation("reference", "composeformer_attention_mla.reference:LatentAttention"),
        ),
        summary="multi-head latent attention: caches one latent and one rotary key for all heads",
        claims=("slope", "sees", "window", "set", "relative", "averages", "latent", "even"),
        strategy="composeformer_attention_mla.testing:latents",
    ),
)


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS


@hookimpl
def compose_dialects() -> Iterable[Path]:
    return sorted((Path(__file__).parent / "dialects").glob("*.toml"))
