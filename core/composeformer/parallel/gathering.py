"""A model's tensors in the first process, one at a time and in any order, whatever process holds what.

The first process leads: it says which tensor, or which groups of a stack, it wants next, and all that hold a piece
send it. So it may write files as one process would, and where it fails, the others end with the same error instead
of waiting for it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from composeformer.errors import ComposeError, DialectError, FolderError, InputError
from composeformer.exchange import CommError
from composeformer.parallel.pieces import is_shard, local
from composeformer.parallel.placement import Placement

Groups = tuple[int, int]

# What the first process says in place of a tensor's number.
DONE, FAILED = -1, -2
ERRORS = {kind.__name__: kind for kind in (DialectError, FolderError, InputError)}


class Get(Protocol):
    """A tensor, or the groups from one number up to another of a stack."""

    def __call__(self, name: str, groups: Groups | None = None) -> Tensor: ...


def lead(placement: Placement, state: Mapping[str, Tensor], work: Callable[[Get], object]) -> None:
    """Runs `work(get)` in the first process, where `get(name)` gives a tensor of `state` whole, while the others
    serve it. Every process calls this, with equal names.

    What `work` raises is raised in every process: in the others as an error of the same lines.
    """
    world = placement.world
    names = list(state)
    if world.rank:
        _follow(placement, state, names)
        return
    numbers = {name: number for number, name in enumerate(names)}

    def get(name: str, groups: Groups | None = None) -> Tensor:
        if world.size == 1:
            return state[name] if groups is None else state[name][slice(*groups)]
        _say((numbers[name], *(groups or (-1, -1))), placement)
        found = _found(placement, name, state[name], groups)
        assert found is not None
        return found

    if world.size == 1:
        work(get)
        return
    try:
        work(get)
    except CommError:
        # Nobody is left who could be told.
        raise
    except BaseException as error:
        _say((FAILED, 0, 0), placement)
        lines = error.lines if isinstance(error, ComposeError) else (f"process 0 failed: {_told(error)}",)
        world.first(json.dumps([type(error).__name__, *lines]))
        raise
    _say((DONE, 0, 0), placement)


def _follow(placement: Placement, state: Mapping[str, Tensor], names: Sequence[str]) -> None:
    while True:
        number, start, stop = _say((0, 0, 0), placement)
        if number == DONE:
            return
        if number == FAILED:
            kind, *lines = json.loads(placement.world.first(None))
            raise ERRORS.get(kind, ComposeError)(*lines)
        name = names[number]
        _found(placement, name, state[name], None if start < 0 else (start, stop))


def _say(numbers: tuple[int, ...], placement: Placement) -> list[int]:
    """The numbers that the first process says."""
    said = torch.tensor(numbers, device=placement.world.device)
    with placement.world.meets("which tensor process 0 wants"):
        dist.broadcast(said, 0)
    found: list[int] = said.tolist()
    return found


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _found(placement: Placement, name: str, tensor: Tensor, groups: Groups | None) -> Tensor | None:
    """The tensor, or groups of it, in the first process; None in others, which send what they hold."""
    with placement.world.meets(name):
        return _collected(placement, name, tensor, groups)


def _collected(placement: Placement, name: str, tensor: Tensor, groups: Groups | None) -> Tensor | None:
    world = placement.world
    number = placement.stacks.get(name)
    if is_shard(tensor):
        whole = _gathered(local(tensor), len(tensor), world.size, world.rank, None)
    elif number is None:
        whole = None if world.rank else tensor
    elif world.outer_rank:
        # The first expert group holds the same.
        whole = None
    else:
        each = number // world.experts
        if groups is not None and groups[0] // each == (groups[1] - 1) // each:
            owner = groups[0] // each
            start, stop = (group - owner * each for group in groups)
            return _sent(tensor[start:stop] if owner == world.rank else tensor[: stop - start], owner, world.rank)
        whole = _gathered(tensor, number, world.experts, world.rank, world.expert_group)
    return whole if whole is None or groups is None else whole[slice(*groups)]


def _sent(part: Tensor, owner: int, rank: int) -> Tensor | None:
    """What the owner holds, in the first process; others give something of its shape."""
    if owner == 0:
        return None if rank else part
    if rank == owner:
        dist.send(_bytes(part), 0)
    if rank:
        return None
    arriving = torch.empty_like(_bytes(part))
    dist.recv(arriving, owner)
    return arriving.view(part.dtype).view(part.shape)


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes in a row: what every backend takes, whatever the dtype."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _gathered(
    part: Tensor, rows: int, size: int, rank: int, group: "dist.ProcessGroup | None"
) -> Tensor | None:
    """Parts of equal numbers of rows, the last ones perhaps short, joined in the first process."""
    each = -(-rows // size)
    row = part.shape[1:].numel() * part.element_size()
    flat = _bytes(part)
    flat = F.pad(flat, (0, each * row - len(flat)))
    if rank:
        dist.gather(flat, None, dst=0, group=group)
        return None
    joined = torch.empty(size * each * row, dtype=torch.uint8, device=part.device)
    dist.gather(flat, list(torch.split(joined, each * row)), dst=0, group=group)
    return joined.view(part.dtype).view(size * each, *part.shape[1:])[:rows]
