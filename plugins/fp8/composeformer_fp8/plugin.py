"""Registers the scaled precision policies and codecs. Imports no torch."""

from collections.abc import Iterable

from composeformer.contracts import Component
from composeformer.hookspecs import hookimpl

COMPONENTS: tuple[Component, ...] = ()


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS
