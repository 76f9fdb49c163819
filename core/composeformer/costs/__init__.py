"""What a model is, needs and costs, from its spec alone, without torch."""

from composeformer.costs.counts import Active, Counts, Flops, cost
from composeformer.costs.folders import Checkpoint, checkpoint

__all__ = ["Active", "Checkpoint", "Counts", "Flops", "checkpoint", "cost"]
