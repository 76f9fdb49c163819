"""Registers the communication parts. Imports no torch."""

from collections.abc import Iterable
from pathlib import Path

from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl
from composeformer_comm.config import Collective, Hierarchical, Local

COMPONENTS = (
    Component(
        "comm",
        "local",
        Local,
        (Implementation("reference", "composeformer_comm.local:LocalExchange"),),
        summary="all experts in one process",
        default=True,
    ),
    Component(
        "comm",
        "collective",
        Collective,
        (Implementation("reference", "composeformer_comm.remote:RemoteExchange"),),
        summary="experts over processes, one all-to-all each way",
        strategy="composeformer_comm.testing:collectives",
    ),
    Component(
        "comm",
        "hierarchical",
        Hierarchical,
        (Implementation("reference", "composeformer_comm.remote:RemoteExchange"),),
        summary="experts over nodes of processes, a token crossing once per node",
        strategy="composeformer_comm.testing:hierarchies",
    ),
)


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS


@hookimpl
def compose_topologies() -> Iterable[Path]:
    return sorted((Path(__file__).parent / "topologies").glob("*.toml"))
