"""A balanced router like `sigmoid-bias`, on paper; what is wrong is in its module."""

from collections.abc import Iterable

from composeformer.config import Config, config, field
from composeformer.contracts import Component, Constant, Declared, Implementation, Linear, Weight
from composeformer.errors import Problem
from composeformer.hookspecs import hookimpl
from composeformer.site import Site


@config
class Balanced(Config):
    """Sigmoids, and a bias on the choice."""

    top_k: int = field(minimum=1, unit="experts", help="Experts that each token passes through.")
    speed: float = field(0.01, minimum=0.0, affects="training", help="How far the bias moves in a step.")

    def validate(self, site: Site) -> Iterable[Problem]:
        experts = site.sizes["num_experts"]
        if self.top_k > experts:
            yield Problem("top_k", self.top_k, f"must be <= num_experts ({experts})")

    def tensors(self, site: Site) -> Iterable[Declared]:
        experts = site.sizes["num_experts"]
        yield Linear(name="gate", inputs=site.width, outputs=experts, sensitive=True)
        yield Weight(name="bias", shape=(experts,), dtype="float32", trains=False, init=Constant(0.0))
        yield Weight(name="load", shape=(experts,), dtype="int64", trains=False, init=Constant(0))


@hookimpl
def compose_components() -> Iterable[Component]:
    yield Component(
        "router", "balanced", Balanced, (Implementation("reference", "counts_evaluation.module:Router"),)
    )
