"""The training parts on paper: what their fields mean. Imports no torch."""

from collections.abc import Iterable
from typing import ClassVar

from composeformer.config import Config, config, field
from composeformer.contracts import Cost, Phase, Saved
from composeformer.site import Site


@config
class NextToken(Config):
    """Cross-entropy of each token's successor within its document, in fp32 or wider."""

    chunk_tokens: int | None = field(
        default=None,
        minimum=1,
        unit="tokens",
        affects="execution",
        help="Tokens whose fp32 probabilities are held at once and made again in the backward; absent: all.",
    )

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        """Of each token its probabilities, or, in pieces, the logits that they are made of again: in fp32 at most."""
        if phase == "train":
            kept = "log-probabilities" if self.chunk_tokens is None else "logits"
            yield Saved(name=kept, elements=site.spec.model.vocab_size, dtype="float32")
            yield Saved(name="labels", elements=1, dtype="int64")


@config
class AdamW(Config):
    """Adam with decoupled weight decay, on matrices alone. The learning rate is `[train]`'s."""

    states: ClassVar[int] = 2  # averages of each parameter's size that are kept

    beta1: float = field(
        default=0.9, minimum=0.0, maximum=0.999999, affects="training", help="Decay of the gradients' mean."
    )
    beta2: float = field(
        default=0.95,
        minimum=0.0,
        maximum=0.999999,
        affects="training",
        help="Decay of the squared gradients' mean.",
    )
    eps: float = field(
        default=1e-8, minimum=0.0, affects="training", help="Added to the root of the squares' mean."
    )
    weight_decay: float = field(
        default=0.1, minimum=0.0, affects="training", help="Decay of matrices, times the learning rate."
    )
