"""Registers `gated-delta`. Imports no torch."""

from collections.abc import Iterable

from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl
from gated_delta.config import GatedDelta


@hookimpl
def compose_components() -> Iterable[Component]:
    yield Component(
        "mixer",
        "gated-delta",
        GatedDelta,
        (
            Implementation("chunked", "gated_delta.module:Chunked", phases=("train", "prefill")),
            Implementation("reference", "gated_delta.module:Recurrent"),
        ),
        summary="a recurrence that forgets and overwrites, with a state for a cache",
        strategy="gated_delta.testing:tables",
    )
