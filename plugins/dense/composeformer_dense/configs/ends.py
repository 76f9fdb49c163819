"""`token` and `linear`: the embedding and the head on paper.

Sources: Press and Wolf, arXiv 1608.05859 (the tied head); Gemma Team, arXiv 2408.00118 (the soft cap).
"""

from collections.abc import Iterable

from composeformer.config import Config, config, field
from composeformer.contracts import Cost, Declared, Linear, Normal, Phase, Saved, Weight
from composeformer.site import Site


@config
class TokenEmbedding(Config):
    """scale * weight[id]. Initial values: normal with `init_std`."""

    scale: float = field(default=1.0, above=0.0, help="Multiplies the embeddings.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        model = site.spec.model
        yield Weight(name="weight", shape=(model.vocab_size, model.hidden_size), init=Normal(model.init_std))

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        if phase == "train":
            yield Saved(name="nothing")  # ids, which the batch has anyway


@config
class LinearHead(Config):
    """cap * tanh(scale * W hidden / cap), without a cap scale * W hidden. W is the embedding's when tied.

    Initial values: normal with `init_std`.
    """

    cap: float | None = field(default=None, above=0.0, help="Soft cap of the logits.")
    scale: float = field(default=1.0, above=0.0, help="Multiplies the logits, before a cap.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        model = site.spec.model
        yield Linear(
            name="projection",
            inputs=model.hidden_size,
            outputs=model.vocab_size,
            sensitive=True,
            same_as="embedding.weight" if model.tie_embeddings else None,
            init=Normal(model.init_std),
        )

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        if phase == "train":
            yield Saved(name="input", inputs=("projection",))
            if self.cap is not None:
                yield Saved(name="tanh", output="projection")
