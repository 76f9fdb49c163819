"""What is no expert, sharded over all processes by FSDP2: parameters, gradients and moments.

Source: PyTorch FSDP2 (`fully_shard`); ZeRO stage 3, arXiv 1910.02054. Units are the layers, the predictor, and the
rest of the model: never less than a part, whose maps are also read outside their forward (`matrix()`). Nothing is
cast: a precision policy does that with what was gathered. Gradients are summed, not averaged, since the loss is
divided by the whole step's weight.

A unit is gathered in one dtype, that of most of its elements. Parameters of another, scalars, and those that several
units share stay whole in every process; their gradients are summed like those of a model that is not sharded.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from composeformer.parallel.placement import Placement


def shard(model: Any, placement: Placement) -> None:
    """Shards a model on the meta device, in place; the names of its tensors stay."""
    units = [*model.layers, *([] if model.predictor is None else [model.predictor]), model]
    # Bottom up, so that what is left at last is the model's own.
    inner = {id(module) for unit in units[:-1] for module in unit.modules()}
    owned = [*(list(unit.modules()) for unit in units[:-1])]
    owned.append([module for module in model.modules() if id(module) not in inner])
    whole = _whole(model, owned, placement)
    for unit in units:
        # By default the last unit stays gathered after a forward pass, and so its gathered parameters would be the
        # model's until a backward pass: an optimizer made then, or gradients set to zero then, would be of those.
        fully_shard(unit, mesh=placement.world.mesh, reshard_after_forward=True, ignored_params=whole)
        # A plain sum: gloo has no other, and so the same arithmetic serves every backend.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _whole(
    model: nn.Module, owned: Sequence[Sequence[nn.Module]], placement: Placement
) -> set[nn.Parameter]:
    """The parameters that are not sharded: cut by expert already, or not fit for their unit."""
    cut = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in placement.stacks}
    homes: dict[int, set[int]] = {}
    sizes: list[Counter[torch.dtype]] = []
    found: dict[int, nn.Parameter] = {}
    for number, modules in enumerate(owned):
        sizes.append(Counter())
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is None:
                    continue
                if id(parameter) not in cut and number not in homes.get(id(parameter), ()):
                    sizes[number][parameter.dtype] += parameter.numel()
                homes.setdefault(id(parameter), set()).add(number)
                found[id(parameter)] = parameter
    main = [count.most_common(1)[0][0] if count else None for count in sizes]
    return {
        parameter
        for key, parameter in found.items()
        if key in cut
        or not parameter.ndim
        or len(homes[key]) > 1
        or parameter.dtype != main[next(iter(homes[key]))]
    }


def syncs(model: nn.Module, last: bool) -> None:
    """Whether the next backward pass sums gradients over processes: that of a step's last micro-batch does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


@contextmanager
def gathered(*units: nn.Module) -> Iterator[None]:
    """The units' own parameters whole, for what is called beside their forward; all processes call it."""
    sharded = [unit for unit in units if isinstance(unit, FSDPModule)]
    for unit in sharded:
        unit.unshard()
    try:
        yield
    finally:
        for unit in sharded:
            unit.reshard()
