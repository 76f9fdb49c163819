"""The gradients of a step, over all processes that hold the parameters: their sum, their norm, clipping by it.

A loss is divided by the weight of the whole step, so gradients of processes add. Those of an expert arrive summed
over its expert group, since its tokens came from there, and are summed over the other groups' equals here. FSDP2 has
summed those of a shard. What every process holds whole is summed over all. A shared tensor is one parameter.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composeformer.decoder import Model
from composeformer.parallel.pieces import is_shard, local
from composeformer.train.after import path_of

# What is summed in one collective; more would only cost memory.
BUCKET_BYTES = 2**26


class Gradients:
    """The gradients of a model's parameters, told apart by which processes hold those."""

    def __init__(self, model: Model) -> None:
        self.world = model.placement.world
        stacks = model.placement.stacks
        self.shards: list[nn.Parameter] = []
        self.experts: list[nn.Parameter] = []
        self.whole: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if is_shard(parameter):
                self.shards.append(parameter)
            elif path_of(name) in stacks:
                self.experts.append(parameter)
            else:
                self.whole.append(parameter)

    @torch.no_grad()
    def reduce(self) -> None:
        """Makes every gradient that of all processes' tokens. Every process calls it, once after the backward passes.

        A parameter that some process used has a gradient in all; one that none used has none.
        """
        if self.world.size == 1:
            return
        loose = [*self.experts, *self.whole]
        if not loose:
            return
        used = torch.tensor([p.grad is not None for p in loose], dtype=torch.int32, device=self.world.device)
        for parameter, anywhere in zip(loose, self.world.largest(used).tolist(), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for parameter in self.experts:
            if parameter.grad is not None:
                self.world.sum_copies(parameter.grad)
        for bucket in _buckets([p.grad for p in self.whole if p.grad is not None]):
            joined = self.world.sum(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            parts = torch.split(joined, [gradient.numel() for gradient in bucket])
            for gradient, summed in zip(bucket, parts, strict=True):
                gradient.copy_(summed.view_as(gradient))

    @torch.no_grad()
    def norm(self) -> Float[Tensor, ""]:
        """The 2-norm of all gradients of the whole model, in fp32 or wider; zero where there are none."""
        norms = [_norm(p.grad) for p in self._counted() if p.grad is not None]
        if self.world.size == 1:
            return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        held = [p.grad.dtype for p in self._all() if p.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for norm in norms:
            squares += norm.double().square()
        total = self.world.sum(squares).sqrt()
        return total if torch.float64 in held else total.float()

    @torch.no_grad()
    def clip(self, norm: Float[Tensor, ""], largest: float) -> None:
        """Scales all gradients, whose norm is `norm`, so that it is at most `largest`."""
        scale = torch.clamp(largest / (norm + 1e-6), max=1.0)
        gradients = [local(p.grad) for p in self._all() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale.to(gradients[0].device))

    def _all(self) -> Iterator[nn.Parameter]:
        yield from self.shards
        yield from self.experts
        yield from self.whole

    def _counted(self) -> Iterator[nn.Parameter]:
        """Those that this process counts, so that of each element one does."""
        yield from self.shards
        if self.world.outer_rank == 0:
            yield from self.experts
        if self.world.rank == 0:
            yield from self.whole


def _norm(gradient: Tensor) -> Tensor:
    here = local(gradient)
    norm: Tensor = torch.linalg.vector_norm(here, dtype=torch.promote_types(here.dtype, torch.float32))
    return norm


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype, in order, of no more than `BUCKET_BYTES` together or a single one."""
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        bucket: list[Tensor] = []
        for gradient in (g for g in gradients if g.dtype == dtype):
            if bucket and sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(gradient)
        if bucket:
            yield bucket
