"""A kind that a built-in plugin has."""

from composeformer.config import Config, config
from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl


@config
class Mine(Config):
    """Nothing to choose."""


REFERENCE = (Implementation("reference", "duplicate_kind:Module"),)


@hookimpl
def compose_components():
    yield Component("mixer", "gqa", Mine, REFERENCE)
