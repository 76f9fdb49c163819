"""A model's tensors whole in the first process, one at a time and in any order, whatever process holds what.

The first process leads: it says which tensor it wants next, and all that hold a piece send it. So it may write files
as one process would, and where it fails, the others end with the same error instead of waiting for it.
"""

import json
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from composeformer.errors import ComposeError, DialectError, FolderError, InputError
from composeformer.parallel.pieces import is_shard, local
from composeformer.parallel.placement import Placement

T = TypeVar("T")
Get = Callable[[str], Tensor]

ERRORS = {kind.__name__: kind for kind in (DialectError, FolderError, InputError)}

_DONE, _FAILED = -1, -2


def lead(
    placement: Placement, state: Mapping[str, Tensor], work: Callable[[Get], object]
) -> None:
    """Runs `work(get)` in the first process, where `get(name)` gives a tensor of `state` whole, while the others
    serve it. Every process calls this, with equal names.

    What `work` raises is raised in every process: in the others as an error of the same lines.
    """
    world = placement.world
    if world.size == 1:
        work(state.__getitem__)
        return
    names = sorted(state)
    if world.rank:
        _follow(placement, state, names)
        return
    numbers = {name: number for number, name in enumerate(names)}

    def get(name: str) -> Tensor:
        _say(numbers[name], placement)
        found = _whole(placement, name, state[name])
        assert found is not None
        return found

    try:
        work(get)
    except BaseException as error:
        _say(_FAILED, placement)
        lines = error.lines if isinstance(error, ComposeError) else (f"process 0 failed: {_told(error)}",)
        world.first(json.dumps([type(error).__name__, *lines]))
        raise
    _say(_DONE, placement)


def _follow(placement: Placement, state: Mapping[str, Tensor], names: list[str]) -> None:
    while True:
        number = _say(0, placement)
        if number == _DONE:
            return
        if number == _FAILED:
            kind, *lines = json.loads(placement.world.first(None))
            raise ERRORS.get(kind, ComposeError)(*lines)
        _whole(placement, names[number], state[names[number]])


def _say(number: int, placement: Placement) -> int:
    """The number that the first process says."""
    said = torch.tensor([number], device=placement.world.device)
    dist.broadcast(said, 0)
    return int(said)


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _whole(placement: Placement, name: str, tensor: Tensor) -> Tensor | None:
    """The whole tensor in the first process; None in others, which send what they hold."""
    world = placement.world
    if is_shard(tensor):
        return _gathered(local(tensor), len(tensor), world.size, world.rank, None)
    number = placement.stacks.get(name)
    if number is None:
        return None if world.rank else tensor
    # The other expert groups hold the same.
    if world.outer_rank:
        return None
    return _gathered(tensor, number, world.experts, world.rank, world.expert_group)


def _gathered(
    part: Tensor, rows: int, size: int, rank: int, group: "dist.ProcessGroup | None"
) -> Tensor | None:
    """Parts of equal numbers of rows, the last ones perhaps short, joined in the first process. They travel as
    bytes, which every backend takes.
    """
    each = -(-rows // size)
    row = part.shape[1:].numel() * part.element_size()
    flat = part.contiguous().view(-1).view(torch.uint8)
    flat = F.pad(flat, (0, each * row - len(flat)))
    if rank:
        dist.gather(flat, None, dst=0, group=group)
        return None
    joined = torch.empty(size * each * row, dtype=torch.uint8, device=part.device)
    dist.gather(flat, list(torch.split(joined, each * row)), dst=0, group=group)
    return joined.view(part.dtype).view(size * each, *part.shape[1:])[:rows]
