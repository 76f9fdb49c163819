"""A generator that raises midway: nothing of it may be had."""

from composeformer.config import Config, config
from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl


@config
class Mine(Config):
    """Nothing to choose."""


REFERENCE = (Implementation("reference", "half_registered:Module"),)


@hookimpl
def compose_components():
    yield Component("norm", "half", Mine, REFERENCE)
    raise OSError("the list of the other half is missing")
