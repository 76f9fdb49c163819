"""Registers `mtp`. Imports no torch: modules are named, and loaded when a model is built."""

from collections.abc import Iterable

from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl
from composeformer_mtp.config import MTP

COMPONENTS = (
    Component(
        "predictor",
        "mtp",
        MTP,
        (Implementation("reference", "composeformer_mtp.module:MultiTokenPrediction"),),
        summary="sequential modules that each predict one token further",
        claims=("own-head", "from-hidden", "embedding-first", "sequential"),
        strategy="composeformer_mtp.testing:predictors",
    ),
)


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS
