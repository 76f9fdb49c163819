"""`moe`: the mixture of experts on paper.

Sources: DeepSeekMoE, arXiv 2401.06066 (shared and fine-grained experts); DeepSeek-V3, arXiv 2412.19437,
section 2.1.2. Every expert is a SwiGLU (arXiv 2002.05202).
"""

from collections.abc import Iterable
from math import sqrt
from typing import Any, cast

import attrs

from composeformer.config import Config, config, field, part
from composeformer.contracts import Cost, Declared, Exchange, Linear, Normal, Part, Phase, Saved
from composeformer.conventions import Convention, Swap
from composeformer.errors import Problem
from composeformer.site import Site


@config
class MoE(Config):
    """The sum of the shared experts and of the `top_k` experts that the router chose, times its weights.

    No token is dropped. Initial values: normal with `init_std`; the last projections divided by
    sqrt(2 layers), as in a dense feed-forward network.
    """

    num_experts: int = field(minimum=1, unit="experts", help="Routed experts.")
    intermediate_size: int = field(minimum=1, unit="features", help="Width of each routed expert.")
    num_shared_experts: int = field(
        default=0, minimum=0, unit="experts", help="Experts that every token passes through; one map in fact."
    )
    shared_intermediate_size: int | None = field(
        None,
        minimum=1,
        unit="features",
        help="Width of each shared expert; absent: that of a routed one.",
    )
    router: Part = part("router", help="Chooses each token's experts, and weighs their outputs.")

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together."""
        return self.num_shared_experts * (self.shared_intermediate_size or self.intermediate_size)

    def validate(self, site: Site) -> Iterable[Problem]:
        if self.shared_intermediate_size is not None and not self.num_shared_experts:
            told = "there are no shared experts; give num_shared_experts"
            yield Problem("shared_intermediate_size", self.shared_intermediate_size, told)

    def filled(self, site: Site) -> "MoE":
        """Without a shared width that says what its absence would."""
        if self.shared_intermediate_size != self.intermediate_size:
            return self
        filled: MoE = attrs.evolve(cast(Any, self), shared_intermediate_size=None)
        return filled

    def tensors(self, site: Site) -> Iterable[Declared]:
        inner = Normal(site.spec.model.init_std)
        outer = Normal(site.spec.model.init_std / sqrt(2 * site.num_layers))
        yield site.part(self.router, "router", same_input=True, num_experts=self.num_experts)
        for name, inputs, outputs, init in (
            ("gate", site.width, self.intermediate_size, inner),
            ("up", site.width, self.intermediate_size, inner),
            ("down", self.intermediate_size, site.width, outer),
        ):
            yield Linear(
                name=name,
                inputs=inputs,
                outputs=outputs,
                groups=self.num_experts,
                active=min(self.router.config.top_k, self.num_experts),
                shard="group",
                init=init,
            )
        if self.shared_width:
            for name in ("shared_gate", "shared_up"):
                yield Linear(name=name, inputs=site.width, outputs=self.shared_width, shard="out", init=inner)
            yield Linear(
                name="shared_down", inputs=self.shared_width, outputs=site.width, shard="in", init=outer
            )

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        top_k: int = self.router.config.top_k
        yield Exchange(name="dispatch", elements=site.width, fan_out=top_k)
        yield Exchange(name="combine", elements=site.width, fan_out=top_k)
        if phase == "train":
            yield from self._kept(site.width, min(top_k, self.num_experts))

    def _kept(self, width: int, top_k: int) -> Iterable[Saved]:
        """Each row that an expert gets, and what is in it; then results, places and weights, to combine them."""
        yield Saved(name="rows", inputs=("gate", "up"))
        yield Saved(name="gate", output="gate")
        yield Saved(name="up", output="up")
        yield Saved(name="activated", output="gate", recompute="none")
        yield Saved(name="inner", inputs=("down",), recompute="none")
        yield Saved(name="results", output="down")
        yield Saved(name="places", elements=2 * top_k, dtype="int64")
        yield Saved(name="weights", elements=top_k, dtype="float32")
        yield Saved(name="no expert", elements=top_k, dtype="bool")
        # Rows are twice as many at most, and kept beside what they were made of; copies of weights are no token's.
        blocks = top_k * (2 * width + 4 * self.intermediate_size)
        yield Saved(name="blocks", elements=blocks, implementations=("batched",))
        if self.shared_width:
            yield Saved(name="input", inputs=("shared_gate", "shared_up"))
            yield Saved(name="shared gate", output="shared_gate")
            yield Saved(name="shared up", output="shared_up")
            yield Saved(name="shared activated", output="shared_gate", recompute="none")
            yield Saved(name="shared inner", inputs=("shared_down",), recompute="none")

    def conventions(self, site: Site) -> Iterable[Convention]:
        names = ("", "shared_") if self.shared_width else ("",)
        swaps = tuple(Swap(first=f"{name}gate.weight", second=f"{name}up.weight") for name in names)
        yield Convention(name="gate and up", usual="as named", other="exchanged", changes=swaps)
