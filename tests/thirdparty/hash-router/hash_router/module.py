"""The router `hash`: for every token id a random set of distinct experts, by arithmetic alone.

A hash is Carter and Wegman's (1979), h(id) = ((a id + b) mod p) mod m, with p = 2^31 - 1 and a, b drawn from the seed.
K distinct experts of E are drawn as Floyd draws a sample (Bentley and Floyd, 1987): for m = E - K + 1, ..., E take
h(id), or m - 1 where h(id) is taken already. Every set is as likely as any other.

Shapes: B rows of T tokens, D features, K chosen experts.
"""

from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from composeformer.tensors import Batch, Routing
from hash_router.plugin import Hash

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite

# A prime, and small enough that its square is an int64.
PRIME = 2**31 - 1


class HashRouter(nn.Module):
    """The reference. It reads no hidden state, and has no side results."""

    def __init__(self, config: Hash, site: "TensorSite") -> None:
        super().__init__()
        self.num_experts, self.top_k = site.sizes["num_experts"], config.top_k
        self.weight = config.routed_scaling_factor / config.top_k
        self.factors = [factors(config.seed, k) for k in range(config.top_k)]

    def forward(self, x: Float[Tensor, "B T D"], batch: Batch) -> Routing:
        """Each token by its id alone; weights in fp32, or in fp64 as x is."""
        kind = torch.promote_types(x.dtype, torch.float32)
        indices = self.experts(batch.ids)
        return Routing(indices, torch.full(indices.shape, self.weight, dtype=kind, device=x.device))

    def experts(self, ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T K"]:
        """The experts of every id."""
        chosen: list[Tensor] = []
        for k, (a, b) in enumerate(self.factors):
            size = self.num_experts - self.top_k + 1 + k
            drawn = (ids.remainder(PRIME) * a + b).remainder(PRIME).remainder(size)
            for other in chosen:
                # At most one is equal, and what replaces it is above all that were drawn before.
                drawn = torch.where(drawn == other, size - 1, drawn)
            chosen.append(drawn)
        return torch.stack(chosen, -1)


def factors(seed: int, k: int) -> tuple[int, int]:
    """The multiplier, not zero, and the addend of the k-th hash."""
    digest = blake2b(f"{seed}/{k}".encode(), digest_size=16).digest()
    a, b = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8))
    return 1 + a % (PRIME - 1), b % PRIME
