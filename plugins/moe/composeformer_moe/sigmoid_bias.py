"""The `sigmoid-bias` router: each expert's own sigmoid, and a bias on the choice that balances without a loss.

    s_ti = sigmoid(w_i . x_t)           chosen: the K largest s_ti + b_i, within the best groups by them
    g_ti = s s_ti, or s s_ti / sum_chosen s_tj normalised             the bias is not in the weights
    b_i += speed sign(mean load - load_i)                             after each step

Sources: arXiv 2408.15664, algorithm 1; arXiv 2412.19437, equations 12 to 20 (loss: `balance`, of sigmoids divided
by their sum). Normalising is a softmax of log-sigmoids, so that weights have their sum even where sigmoids
underflow; released code adds 1e-20 to the sum instead.

The bias is fp32 whatever the model is cast to: its steps would be lost in bf16. It is a buffer, moved in place.

Shapes: B rows of T tokens, E experts, K chosen.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from composeformer.tensors import Aux, Batch, Routing
from composeformer_moe.balance import balance_loss
from composeformer_moe.choice import best, in_best_groups
from composeformer_moe.gate import Gate
from composeformer_moe.routers import SigmoidBias

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite
    from composeformer.train import Run


class SigmoidBiasRouter(Gate):
    """The reference. Its loss is that of training, and only where its alpha is above 0."""

    bias: Tensor

    def __init__(self, config: SigmoidBias, site: "TensorSite") -> None:
        super().__init__(config, site)
        self.balance_alpha = config.sequence_balance_alpha
        self.bias = site.weight("bias")

    def forward(self, x: Float[Tensor, "B T D"], batch: Batch) -> Routing:
        """Each token alone; what stands at padding is finite."""
        logits_BTE = self.logits(x)
        scores_BTE = logits_BTE.sigmoid()
        biased_BTE = scores_BTE.detach() + self.bias
        indices_BTK = best(in_best_groups(biased_BTE, *self.groups), self.top_k)
        if self.normalize:
            weights_BTK = log_sigmoid(logits_BTE.gather(-1, indices_BTK)).softmax(-1)
        else:
            weights_BTK = scores_BTE.gather(-1, indices_BTK)
        losses = {}
        if batch.phase == "train" and self.balance_alpha:
            shares_BTE = log_sigmoid(logits_BTE).softmax(-1)
            balance = balance_loss(shares_BTE, indices_BTK, batch.valid)
            losses[f"{self.path}.balance"] = self.balance_alpha * balance
        return Routing(indices_BTK, weights_BTK * self.factor, Aux(losses))

    def after_step(self, totals: Mapping[str, Tensor], run: "Run") -> None:
        """Moves the bias of each expert by `bias_update_speed` towards a mean load, compared in integers."""
        load = totals.get("load")
        if load is not None:
            direction = torch.sign(load.sum() - load * self.num_experts)
            self.bias.add_(direction.to(self.bias.dtype), alpha=run.value("bias_update_speed"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SigmoidBiasRouter":
        """What `to`, `half` and the like do; a cast leaves the bias as it is."""
        bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self


def log_sigmoid(x: Tensor) -> Tensor:
    """As PyTorch's, which starts all threads even for one number. Above the threshold it is exact to fp64."""
    return -F.softplus(-x, threshold=50)
