"""Registers the router `hash`, and says what it is on paper. Imports no torch.

Source: Hash Layers, arXiv 2106.04426, section 3.2 (random hash).
"""

from collections.abc import Iterable

from composeformer.config import Config, config, field
from composeformer.contracts import Component, Implementation
from composeformer.errors import Problem
from composeformer.hookspecs import hookimpl
from composeformer.site import Site


@config
class Hash(Config):
    """Each token id has `top_k` experts of its own, drawn by hashes, which all count alike."""

    top_k: int = field(minimum=1, unit="experts", help="Experts that each token passes through.")
    routed_scaling_factor: float = field(1.0, above=0.0, help="What the weights sum to.")
    seed: int = field(0, minimum=0, help="Which hashes; layers with different ones mix more.")

    def validate(self, site: Site) -> Iterable[Problem]:
        experts = site.sizes["num_experts"]
        if self.top_k > experts:
            yield Problem("top_k", self.top_k, f"must be <= num_experts ({experts})")


@hookimpl
def compose_components() -> Iterable[Component]:
    yield Component(
        "router",
        "hash",
        Hash,
        (Implementation("reference", "hash_router.module:HashRouter"),),
        summary="experts by hashes of the token's id",
        strategy="hash_router.testing:tables",
    )
