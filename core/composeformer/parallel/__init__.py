"""A run over several processes: which of them holds what of a model, and how they agree.

All processes have tokens of their own. Those of one expert group share the experts, each with some; what is no
expert is sharded over all processes (FSDP2), or each has all of it. torchrun starts them; `start` makes them meet,
unless the program did, and `build` and `load` call it.
"""

from composeformer.parallel.placement import Placement, place
from composeformer.parallel.world import World, start, stop

__all__ = ["Placement", "World", "place", "start", "stop"]
