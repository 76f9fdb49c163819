"""Text between processes, as bytes: nothing that is received is ever executed."""

import json
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from hashlib import blake2b
from itertools import zip_longest
from typing import NewType

import torch
from torch import Tensor
from torch import distributed as dist

from composeformer.errors import InputError, show
from composeformer.manifest import cut

Words = NewType("Words", Mapping[str, str])


def shared_words(words: Words, what: str, rank: int, size: int, device: torch.device) -> None:
    """Raises InputError in every process where their words differ; one small collective where they do not."""
    text = json.dumps(dict(words))
    number = int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")
    bounds = torch.tensor([number, -number], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if int(bounds[0]) == -int(bounds[1]):
        return
    every: list[dict[str, str]] = [json.loads(each) for each in gathered(text, size, device)]
    for other in range(1, size):
        for name in dict.fromkeys([*every[0], *every[other]]):
            mine, theirs = every[0].get(name, ""), every[other].get(name, "")
            if mine != theirs:
                told = f"the processes differ in {name}, so they can not {what}"
                raise InputError(*cut([f"{told}: {pair}" for pair in _pairs(mine, theirs, other)]))


def gathered(text: str, size: int, device: torch.device) -> Sequence[str]:
    """Every process's text, in their order."""
    data = text.encode()
    lengths = torch.zeros(size, dtype=torch.int64, device=device)
    lengths[dist.get_rank()] = len(data)
    dist.all_reduce(lengths)
    longest = int(lengths.max())
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    mine[: len(data)] = _bytes(data, device)
    every = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(every, mine)
    return [_text(one[: int(length)]) for one, length in zip(every, lengths, strict=True)]


def told_by_first(text: str | None, rank: int, device: torch.device) -> str:
    """The first process's text, in all of them."""
    data = str(text).encode() if rank == 0 else b""
    length = torch.tensor([len(data)], device=device)
    dist.broadcast(length, 0)
    message = _bytes(data, device) if rank == 0 else torch.empty(int(length), dtype=torch.uint8, device=device)
    if int(length):
        dist.broadcast(message, 0)
    return _text(message)


def _bytes(data: bytes, device: torch.device) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8, device=device)


def _text(message: Tensor) -> str:
    return bytes(message.tolist()).decode()


def _pairs(first: str, other: str, rank: int) -> list[str]:
    """Where two texts differ: of several lines, those that one has and the other has not, or has otherwise."""
    mine, theirs = first.splitlines(), other.splitlines()
    pairs: list[tuple[str | None, str | None]] = []
    for what, a, b, c, d in SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes():
        if what != "equal":
            pairs += zip_longest(mine[a:b], theirs[c:d])
    return [f"process 0 has {_shown(m)}, process {rank} {_shown(t)}" for m, t in pairs or [(first, other)]]


def _shown(line: str | None) -> str:
    return "nothing" if not line else show(line)
