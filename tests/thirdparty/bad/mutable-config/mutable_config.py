"""A config that is not frozen: whoever holds one could change another's model."""

import attrs

from composeformer.config import Config, field
from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl


@attrs.define(slots=False)
class Mutable(Config):
    """Anybody may set `size`."""

    size: int = field(default=3, minimum=1)


@hookimpl
def compose_components():
    yield Component("norm", "mutable", Mutable, (Implementation("reference", "mutable_config:Module"),))
