"""A mean of all tokens up to each, priced twice: once with half of its products, once with half of its cache."""

from collections.abc import Iterable

from composeformer.config import Config, config
from composeformer.contracts import Cache, Component, Core, Cost, Declared, Implementation, Linear, Phase
from composeformer.hookspecs import hookimpl
from composeformer.site import Site


@config
class Mean(Config):
    """What both are; its price is right."""

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="projection", inputs=site.width, outputs=site.width)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Core(name="mean", per_key=2 * site.width)
        yield Cache(name="inputs", per_token=site.width)


@config
class CheapProducts(Mean):
    """A multiply and an add are counted as one."""

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Core(name="mean", per_key=site.width)
        yield Cache(name="inputs", per_token=site.width)


@config
class CheapCache(Mean):
    """Every second element is forgotten."""

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Core(name="mean", per_key=2 * site.width)
        yield Cache(name="inputs", per_token=site.width // 2)


@hookimpl
def compose_components() -> Iterable[Component]:
    reference = (Implementation("reference", "lying_cost.module:MeanOfAll"),)
    yield Component("mixer", "cheap-products", CheapProducts, reference)
    yield Component("mixer", "cheap-cache", CheapCache, reference)
