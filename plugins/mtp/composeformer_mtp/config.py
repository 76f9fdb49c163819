"""`mtp`: sequential multi-token prediction on paper.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.2, equations 21 to 25.
"""

from collections.abc import Iterable
from typing import Any, cast

import attrs

from composeformer.config import Config, config, field, layer, part
from composeformer.contracts import Cost, Declared, LayerParts, Linear, Normal, Part, Phase, Saved, Uses
from composeformer.conventions import Convention, Order, Swap, exchanged
from composeformer.errors import Problem
from composeformer.site import Site


@config
class MTP(Config):
    """Depth k joins the hidden state of depth k - 1 with the embedding of the token k places on, runs a layer of
    its own, and predicts the token after that one by the model's own head.
    """

    depth: int = field(default=1, minimum=1, maximum=16, unit="tokens", help="Further tokens predicted.")
    loss_weight: float = field(
        default=0.3,
        minimum=0.0,
        affects="training",
        help="Weight of the mean of all depths' losses, beside the main loss.",
    )
    layer: LayerParts | None = layer(help="The mixer and ffn of each depth; absent: the last layer's.")
    norm: Part = part("norm", help="Normalises the hidden state and the embedding before they are joined.")

    def validate(self, site: Site) -> Iterable[Problem]:
        longest = site.spec.model.max_position_embeddings
        if self.depth >= longest:
            yield Problem("depth", self.depth, f"must be < max_position_embeddings ({longest})")

    def filled(self, site: Site) -> "MTP":
        filled: MTP = attrs.evolve(cast(Any, self), layer=self.layer or site.spec.layers[-1])
        return filled

    def tensors(self, site: Site) -> Iterable[Declared]:
        parts = (self.layer or site.spec.layers[-1]).items()
        for depth in range(self.depth):
            below = f"depths.{depth}"
            yield site.part(self.norm, f"{below}.enorm")
            yield site.part(self.norm, f"{below}.hnorm")
            yield Linear(
                name=f"{below}.eh_proj",
                inputs=2 * site.width,
                outputs=site.width,
                sensitive=True,
                init=Normal(site.spec.model.init_std),
            )
            for slot, held in parts:
                yield site.part(held, f"{below}.{slot}")
            residual = site.spec.singles["residual"]
            if residual is not None:  # a model that has none is refused for that
                yield site.part(residual, f"{below}.residual", sublayers=tuple(slot for slot, _ in parts))

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Uses(name="the model's head", slot="head", times=self.depth)
        if phase == "train":
            for depth in range(self.depth):
                # What is joined is normalised, which is made again.
                joined = f"depths.{depth}.eh_proj"
                yield Saved(name=joined, inputs=(joined,), recompute="none")

    def conventions(self, site: Site) -> Iterable[Convention]:
        names = [f"depths.{depth}" for depth in range(self.depth)]
        halves = exchanged(site.width, site.width)
        yield Convention(
            name="inputs of eh_proj",
            usual="[embedding; hidden]",
            other="[hidden; embedding]",
            changes=tuple(Order(tensor=f"{name}.eh_proj.weight", dim=-1, indices=halves) for name in names),
        )
        swaps = tuple(Swap(first=f"{name}.enorm.weight", second=f"{name}.hnorm.weight") for name in names)
        yield Convention(name="enorm and hnorm", usual="as named", other="exchanged", changes=swaps)
