"""What routers share: the map from a token to its experts' logits.

It is multiplied in fp32 or wider whatever the precision policy, so that a token's experts are the same under
all of them.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer_moe.routers import SigmoidBias, Softmax

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite


class Gate(nn.Module):
    """A router without its choice."""

    def __init__(self, config: Softmax | SigmoidBias, site: "TensorSite") -> None:
        super().__init__()
        self.path, self.num_experts = site.path, site.sizes["num_experts"]
        self.top_k, self.factor, self.normalize = config.top_k, config.routed_scaling_factor, config.normalize
        self.groups = config.num_groups, config.top_k_groups, config.group_score
        self.gate = site.linear("gate")

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T E"]:
        """Each expert's logit, in fp32 or wider."""
        kind = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(kind), self.gate.matrix().to(kind))
