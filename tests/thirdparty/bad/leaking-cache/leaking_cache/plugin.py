"""A mean of all tokens up to each; what is wrong is in its module."""

from collections.abc import Iterable

from composeformer.config import Config, config
from composeformer.contracts import Cache, Component, Core, Cost, Declared, Implementation, Linear, Phase
from composeformer.hookspecs import hookimpl
from composeformer.site import Site


@config
class Mean(Config):
    """Nothing to choose."""

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="projection", inputs=site.width, outputs=site.width)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Core(name="mean", per_key=2 * site.width)
        yield Cache(name="inputs", per_token=site.width)


@hookimpl
def compose_components() -> Iterable[Component]:
    yield Component(
        "mixer", "leaking", Mean, (Implementation("reference", "leaking_cache.module:LeakingMean"),)
    )
