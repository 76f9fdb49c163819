"""The mixer `gated-delta`: projections and gates around the recurrence, arXiv 2412.06464, section 3.4.

    y = W_o [norm(o) * silu(W_z x)]        o: what the rule reads, of q, k, v = W_q x, W_k x, W_v x with |q| = |k| = 1

The recurrence and its state are in fp32 (fp64 stays fp64). Padding enters as zeros and leaves the state as it is.

Shapes: B rows, T tokens, D features, H heads, K features of a key, V of a value.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer.tensors import Batch, Output
from gated_delta.cache import StateCache, undone
from gated_delta.config import GatedDelta
from gated_delta.documents import starts_of
from gated_delta.rule import Scanned, Starts, Steps, chunked, recurrent

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite

# Below the square of any key that was meant to be one; a key of zeros stays zero.
TINY = 1e-6


class Recurrent(nn.Module):
    """The reference. An implementation overrides `scan`."""

    A_log: Tensor
    dt_bias: Tensor

    def __init__(self, config: GatedDelta, site: "TensorSite") -> None:
        super().__init__()
        self.k_head_dim, self.v_head_dim = config.k_head_dim, config.v_head_dim
        self.chunk_size = config.chunk_size
        self.q, self.k, self.v, self.z = (site.linear(name) for name in "qkvz")
        self.a, self.b, self.o = (site.linear(name) for name in "abo")
        self.A_log, self.dt_bias = site.weight("A_log"), site.weight("dt_bias")
        self.norm: Any = site.part("norm")

    def forward(self, x: Float[Tensor, "B T D"], batch: Batch, cache: StateCache | None = None) -> Output:
        """The recurrence over x, after all that a cache has read, to which x is added. Padding gives zeros."""
        if batch.valid is not None:
            x = x.masked_fill(~batch.valid[:, :, None], 0)
        steps = self.steps(x)
        if cache is not None:
            read = cache.extend(batch, steps, self.scan)
        else:
            steps = steps if batch.valid is None else undone(steps, batch.valid)
            starts = None if batch.documents is None else starts_of(batch.documents, batch.valid)
            B, _, H, K = steps.k.shape
            read, _ = self.scan(steps, starts, steps.k.new_zeros(B, H, K, self.v_head_dim))
        gate = self.z(x).to(read.dtype).unflatten(-1, (-1, self.v_head_dim))
        return Output(self.o((self.norm(read) * F.silu(gate)).flatten(2)))

    def steps(self, x: Float[Tensor, "B T D"]) -> Steps:
        """What each token does: queries and keys of length one, values, the logarithm of the decay, the strength."""
        kind = self.state_dtype
        q, k = (each(x).to(kind).unflatten(-1, (-1, self.k_head_dim)) for each in (self.q, self.k))
        v = self.v(x).to(kind).unflatten(-1, (-1, self.v_head_dim))
        q, k = (each * (each.square().sum(-1, keepdim=True) + TINY).rsqrt() for each in (q, k))
        g = -self.A_log.to(kind).exp() * F.softplus(self.a(x).to(kind) + self.dt_bias.to(kind))
        return Steps(q * self.k_head_dim**-0.5, k, v, g, self.b(x).to(kind).sigmoid())

    def scan(self, steps: Steps, starts: Starts, state: Float[Tensor, "B H K V"]) -> Scanned:
        """What each token reads, and the state behind the last."""
        return recurrent(steps, starts, state)

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the recurrence and of what it leaves."""
        return torch.promote_types(self.k.dtype, torch.float32)

    def new_cache(self, batch_size: int, max_length: int, max_rollback: int = 0) -> StateCache:
        """An empty cache on the weights' device."""
        return StateCache(
            self.k.weight.shape[-2] // self.k_head_dim,
            self.k_head_dim,
            self.v_head_dim,
            batch_size,
            max_length,
            device=self.k.weight.device,
            dtype=self.state_dtype,
            max_rollback=max_rollback,
        )


class Chunked(Recurrent):
    """The same by chunks."""

    def scan(self, steps: Steps, starts: Starts, state: Float[Tensor, "B H K V"]) -> Scanned:
        return chunked(steps, starts, state, self.chunk_size)
