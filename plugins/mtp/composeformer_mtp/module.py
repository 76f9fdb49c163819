"""Multi-token prediction (`mtp`), as in DeepSeek-V3, arXiv 2412.19437, section 2.2, and its released weights.

    h'_k,t = M_k [enorm(Emb(x_{t+k})); hnorm(h_{k-1},t)]        h_k = norm_k(layer_k(h'_k))
    p(x_{t+k+1}) = head(h_k,t)                                  k = 1 .. depth

h_0 is the model's hidden state behind its last norm. Where the released weights and the paper's equation 21
differ, the weights are followed: the embedding comes first. Embedding and head are the model's own.

Depth k sees token t where t to t + k are real and of one document; the others are padding to it, so that they
have no label, reach no count and no later token.

Shapes: B rows, T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from composeformer.decoder import Layer
from composeformer.tensors import Aux, Batch, Prediction, Rotary
from composeformer_mtp.config import MTP
from composeformer_mtp.drafting import Drafting, draft

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite
    from composeformer.cache import MixerCache


class Depth(Layer):
    """One module: what joins a hidden state with an embedding, and a layer with a norm of its own."""

    def __init__(self, site: "TensorSite", name: str, slots: tuple[str, ...]) -> None:
        mixer, ffn = (site.part(f"{name}.{s}") if s in slots else None for s in ("mixer", "ffn"))
        super().__init__(mixer, ffn, site.part(f"{name}.residual"))
        self.enorm, self.hnorm = site.part(f"{name}.enorm"), site.part(f"{name}.hnorm")
        self.eh_proj = site.linear(f"{name}.eh_proj")

    def forward(  # type: ignore[override]
        self,
        hidden: Float[Tensor, "B T D"],
        embedded: Float[Tensor, "B T D"],
        batch: Batch,
        cache: "MixerCache | None" = None,
    ) -> tuple[Float[Tensor, "B T D"], Aux]:
        """The next depth's hidden state, normalised, and side results."""
        residual: Any = self.residual
        joined = torch.cat([self.enorm(embedded.to(hidden.dtype)), self.hnorm(hidden)], -1)
        stream, aux = super().forward(residual.open(self.eh_proj(joined).to(hidden.dtype)), batch, cache)
        closed: Tensor = residual.close(stream)
        return closed, aux


class MultiTokenPrediction(nn.Module):
    """The predictor: `depths` in sequence."""

    def __init__(self, config: MTP, site: "TensorSite") -> None:
        super().__init__()
        assert config.layer is not None  # filled at its site
        slots = tuple(slot for slot, _ in config.layer.items())
        self.depths = nn.ModuleList(Depth(site, f"depths.{k}", slots) for k in range(config.depth))
        self.embedding, self.head = site.shared("embedding"), site.shared("head")

    def forward(
        self, stream: Float[Tensor, "..."], hidden: Float[Tensor, "B T D"], batch: Batch
    ) -> list[Prediction]:
        """A prediction for each depth that T tokens are enough for; its first T - k tokens alone."""
        found = []
        valid = batch.valid
        for k, depth in enumerate(self.depths, 1):
            length = batch.ids.shape[1] - k
            if length < 1:
                break
            valid = reach(batch, valid, length)
            ahead = Batch(
                batch.ids[:, k:],
                batch.positions[:, :length],
                None if batch.documents is None else batch.documents[:, :length],
                valid,
                {key: Rotary(*(table[:, :length] for table in pair)) for key, pair in batch.tables.items()},
                batch.phase,
            )
            hidden, aux = depth(hidden[:, :length], self.embedding(ahead.ids), ahead)
            found.append(Prediction(self.head(hidden), hidden, ahead, 1 / len(self.depths), aux))
        return found

    def new_cache(self, batch_size: int, max_length: int) -> Drafting:
        """Empty caches for drafting after `batch_size` rows of at most `max_length` tokens, padding included."""
        mixers = [depth.mixer for depth in self.depths]
        caches = [
            None if mixer is None else mixer.new_cache(batch_size, max_length + k, k)  # type: ignore[operator, union-attr]
            for k, mixer in enumerate(mixers)
        ]
        return Drafting(caches, batch_size, next(self.parameters()).device)

    @property
    def num_drafts(self) -> int:
        """Tokens that a call of `draft` gives for each row."""
        return len(self.depths)

    def draft(
        self,
        hidden: Float[Tensor, "B N D"],
        ids: Int[Tensor, "B N"],
        valid: Bool[Tensor, "B N"] | None,
        cache: Drafting,
        rotary: Callable[[Int[Tensor, "B N"]], Mapping[str, Rotary]],
        choose: Callable[[int, Float[Tensor, "B V"]], Int[Tensor, " B"]],
    ) -> Int[Tensor, "B K"]:
        """The tokens that may follow: see `drafting.draft`."""
        return draft(self, hidden, ids, valid, cache, rotary, choose)


def reach(batch: Batch, valid: Bool[Tensor, "B _"] | None, length: int) -> Bool[Tensor, "B length"] | None:
    """Which of the first `length` tokens t go on, real and in one document, up to the token T - length after them.

    `valid` says it for one token less; None means all.
    """
    ahead = batch.ids.shape[1] - length
    real = None if valid is None else valid[:, :length]
    if real is not None and batch.valid is not None:
        real = real & batch.valid[:, ahead:]
    if batch.documents is not None:
        same = batch.documents[:, :length] == batch.documents[:, ahead:]
        real = same if real is None else real & same
    return real
