"""Registers the communication parts. Imports no torch."""

from collections.abc import Iterable

from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl
from composeformer_comm.config import Local

COMPONENTS = (
    Component(
        "comm",
        "local",
        Local,
        (Implementation("reference", "composeformer_comm.local:LocalExchange"),),
        summary="all experts in one process",
        default=True,
    ),
)


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS
