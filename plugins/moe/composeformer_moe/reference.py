"""Mixture of experts (`moe`), plainly: a loop over the experts, each over the tokens that chose it.

    y_t = sum_shared E(x_t) + sum_{i chosen by t} g_ti E_i(x_t)          E(x) = W_down (silu(W_gate x) * W_up x)

Sources: arXiv 2401.06066, equations 9 to 11; arXiv 2412.19437, equations 12 and 13. No token is dropped; all
shared experts are one map of their widths together, which is their sum.

The router chooses, `site.comm` moves rows, and `experts` computes them: an implementation overrides that.

Shapes: B rows of T tokens, D features, K experts a token, E experts, M rows sent to experts.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer.tensors import Aux, Batch, Output, Routing, merge
from composeformer_moe.balance import loads
from composeformer_moe.config import MoE

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite
    from composeformer.exchange import Exchange
    from composeformer.train import Run


class MixtureOfExperts(nn.Module):
    """The reference. In training `aux.counts` has how many real tokens each expert got, exactly."""

    def __init__(self, config: MoE, site: "TensorSite") -> None:
        super().__init__()
        self.path, self.num_experts = site.path, config.num_experts
        self.router: Any = site.part("router")
        self.gate, self.up, self.down = site.linear("gate"), site.linear("up"), site.linear("down")
        self.has_shared = config.shared_width > 0
        if self.has_shared:
            self.shared_gate, self.shared_up = site.linear("shared_gate"), site.linear("shared_up")
            self.shared_down = site.linear("shared_down")
        self.comm: Exchange = site.comm

    def forward(self, x: Float[Tensor, "B T D"], batch: Batch) -> Output:
        """Each token alone. Padding enters as zeros and chooses no expert, so that it is in no count, loss or
        gradient; it leaves as zeros.
        """
        if batch.valid is not None:
            x = x.masked_fill(~batch.valid[:, :, None], 0)
        indices_BTK, weights_BTK, aux = self.router(x, batch)
        if batch.valid is not None:
            indices_BTK = indices_BTK.masked_fill(~batch.valid[:, :, None], self.num_experts)
        routing = Routing(indices_BTK, weights_BTK)
        if self.has_shared:
            routed, beside = self.comm.exchange(x, routing, self.experts, lambda: self.shared(x))
            hidden = routed if beside is None else routed + beside
        else:
            hidden, _ = self.comm.exchange(x, routing, self.experts)
        if batch.phase == "train":
            counts = {f"{self.path}.router.load": loads(indices_BTK, self.num_experts)}
            aux = merge((aux, Aux(counts=counts)))
        return Output(hidden, aux)

    def shared(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What every token passes through."""
        hidden: Tensor = self.shared_down(F.silu(self.shared_gate(x)) * self.shared_up(x))
        return hidden

    def experts(self, rows: Float[Tensor, "M D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "M D"]:
        """Each row's expert of it; rows are sorted by expert, and those beyond the counts come out as zeros."""
        taken = counts.tolist()
        sizes = [*taken, len(rows) - sum(taken)]
        parts = torch.split(rows, sizes)
        maps = zip(self.gate.matrix().unbind(), self.up.matrix().unbind(), self.down.matrix().unbind())
        found = [
            times(F.silu(times(x, gate)) * times(x, up), down) for x, (gate, up, down) in zip(parts, maps)
        ]
        return torch.cat([*found, found[0].new_zeros(parts[-1].shape)])

    def after_step(self, totals: Mapping[str, Tensor], run: "Run") -> dict[str, Tensor]:
        """How even the step's loads were: 0 and 1 are perfect. `max_violation` is the largest load over the
        mean one, less 1; `min_load` the smallest over the mean.
        """
        if "router.load" not in totals:
            return {}
        load = totals["router.load"].double()
        relative = torch.where(load.sum() > 0, load / load.mean(), 1)
        return {"max_violation": relative.max() - 1, "min_load": relative.min()}


def times(x: Float[Tensor, "*N I"], matrix: Float[Tensor, "*E O I"]) -> Float[Tensor, "*N O"]:
    """x by a map's matrix, in the dtype that holds the matrix; with leading dimensions one by one."""
    return x.to(matrix.dtype) @ matrix.mT
