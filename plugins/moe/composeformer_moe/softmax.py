"""The `softmax` router: probabilities of all experts, of which a token keeps the largest.

    p_t = softmax(W x_t)      g_ti = s p_ti                       for the chosen i
                              g_ti = s p_ti / sum_chosen p_tj     normalised: a softmax over the chosen logits

Sources: arXiv 1701.06538; groups by their best expert, arXiv 2405.04434, section 2.2.2; losses, `balance`.
Experts are compared by logit: the order of probabilities, but exact where those round to the same.

Shapes: B rows of T tokens, E experts, K chosen.
"""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from composeformer.tensors import Aux, Batch, Routing
from composeformer_moe.balance import balance_loss, z_loss
from composeformer_moe.choice import best, in_best_groups
from composeformer_moe.gate import Gate
from composeformer_moe.routers import Softmax

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite


class SoftmaxRouter(Gate):
    """The reference. Its losses are those of training, and only where their alpha is above 0."""

    def __init__(self, config: Softmax, site: "TensorSite") -> None:
        super().__init__(config, site)
        self.by_sum = config.top_k_groups < config.num_groups and config.group_score == "top2"
        self.balance_alpha, self.z_alpha = config.balance_alpha, config.z_alpha

    def forward(self, x: Float[Tensor, "B T D"], batch: Batch) -> Routing:
        """Each token alone; what stands at padding is finite."""
        logits_BTE = self.logits(x)
        # The order is the same; only sums of two need probabilities.
        scores_BTE = logits_BTE.softmax(-1) if self.by_sum else logits_BTE
        indices_BTK = best(in_best_groups(scores_BTE, *self.groups), self.top_k)
        if self.normalize:
            weights_BTK = logits_BTE.gather(-1, indices_BTK).softmax(-1)
        else:
            weights_BTK = logits_BTE.softmax(-1).gather(-1, indices_BTK)
        losses = {}
        if batch.phase == "train" and self.balance_alpha:
            balance = balance_loss(logits_BTE.softmax(-1), indices_BTK, batch.valid)
            losses[f"{self.path}.balance"] = self.balance_alpha * balance
        if batch.phase == "train" and self.z_alpha:
            losses[f"{self.path}.z"] = self.z_alpha * z_loss(logits_BTE, batch.valid)
        return Routing(indices_BTK, weights_BTK * self.factor, Aux(losses))
