"""Laws of mixers' caches: whatever a cache has been through, new tokens come out as in one forward of what it holds.

Rows forget and become others, chunks are of any length and phase, padding and packed documents stand anywhere. Chunked
prefill and decoding are the case of feeding alone.
"""

from typing import Any

import torch
from torch import Tensor

from composeformer.cache import TokenCache
from composeformer.costs.counts import held
from composeformer.errors import InputError
from composeformer.testing.bounds import size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.mixing import CHUNK, HUGE, History, Sort, mix, settled


@law(
    "mixer",
    "cached",
    "in chunks through a cache as in one forward",
    kills="chunk-is-aligned-to-the-first-key",
    examples=8,
)
def cached(case: Case) -> None:
    History(case, Sort()).run()


@law(
    "mixer",
    "rollback",
    "a row that forgets its last tokens goes on as if they had never been fed",
    kills="rollback-is-the-longest-for-all",
    examples=12,
)
def rollback(case: Case) -> None:
    History(case, Sort(rollbacks=True)).run()


@law(
    "mixer",
    "rollback-beyond",
    "forgetting more than a cache was made for is refused, or right, also where it is forgotten in turns",
    kills="rollback-beyond-the-ring",
    examples=8,
)
def rollback_beyond(case: Case) -> None:
    """A row forgets more tokens than its room, one by one."""
    room, more, tokens = case.integer("room", 1, 2), case.integer("more", 1, 3), case.integer("tokens", 6, 14)
    x = case.stream("x", 1, tokens + 2)
    left = tokens - room - more
    again = torch.cat([x[:, :left], x[:, tokens:]], 1)
    case.settle(lambda model, y: mix(case, model, y), again)
    model = case.model
    with torch.no_grad():
        cache = model.new_cache(1, tokens + 2, room)
        for each in torch.split(x[:, :tokens], 1, 1):
            mix(case, model, each, cache)
        try:
            for _ in range(room + more):
                cache.rollback(torch.tensor([1]))
        except InputError:
            return
        found, wanted = mix(case, model, x[:, tokens:], cache), mix(case, model, again)[:, left:]
    case.close(found, wanted, "after more was forgotten", scale=size(wanted), terms=tokens)


@law(
    "mixer",
    "reorder",
    "rows that become others go on as those",
    kills="reorder-leaves-the-lengths",
    examples=48,
)
def reorder(case: Case) -> None:
    History(case, Sort(reorders=True, padding=True, steps=4)).run()


@law(
    "mixer",
    "cached-padding",
    "padding changes nothing through a cache, wherever it stands and whatever is in it",
    kills="padding-takes-a-slot",
    examples=12,
)
def cached_padding(case: Case) -> None:
    History(case, Sort(padding=True)).run()


@law(
    "mixer",
    "cached-documents",
    "packed documents do not see each other through a cache",
    kills="cached-documents-are-ignored",
    examples=12,
)
def cached_documents(case: Case) -> None:
    History(case, Sort(documents=True)).run()


@law(
    "mixer",
    "history",
    "after any chunks, rollbacks and reorders, with padding, documents and given positions, as in one forward",
    kills="mask-follows-positions",
    examples=12,
)
def history(case: Case) -> None:
    everything = Sort(rollbacks=True, reorders=True, padding=True, documents=True, positions=True, steps=8)
    History(case, everything).run()


@law(
    "mixer",
    "apart",
    "two caches know nothing of each other, nor does a forward without one",
    kills="mixer-remembers-its-cache",
    examples=8,
)
def apart(case: Case) -> None:
    chunks = case.integers("chunks", 1, CHUNK, 2, 4)
    x, y = case.stream("x", 2, sum(chunks)), case.stream("y", 2, sum(chunks))
    model = case.model
    with torch.no_grad():
        cache = model.new_cache(2, sum(chunks))
        wanted = [mix(case, model, part, cache) for part in torch.split(x, chunks, 1)]
        cache, other = model.new_cache(2, sum(chunks)), model.new_cache(2, sum(chunks))
        found = []
        for ours, theirs in zip(torch.split(x, chunks, 1), torch.split(y, chunks, 1), strict=True):
            found.append(mix(case, model, ours, cache))
            mix(case, model, theirs, other)
            mix(case, model, y)
    case.equal(torch.cat(found, 1), torch.cat(wanted, 1), "with another cache and other forwards between")


@law(
    "mixer",
    "garbage",
    "huge numbers in memory that holds no token change nothing",
    kills="unseen-scores-are-merely-small",
    examples=16,
)
def garbage(case: Case) -> None:
    before, after = case.integer("before", 0, 6), case.integer("after", 1, 6)
    wrong, short = case.integer("forgotten", 1, CHUNK), case.choice("short", [before, before // 2, 0])
    step = case.choice("step", [1, CHUNK])
    x, noise = settled(case, 2, before + after), case.stream("y", 2, wrong)
    # The second row is shorter, so that its free memory lies among what is read of the first.
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[1, :short] = False
    found = []
    with torch.no_grad():
        for factor in (1.0, HUGE):
            cache = case.model.new_cache(2, before + after + wrong, wrong)
            soil(cache.get(case.node.path), factor)
            if before:
                mix(case, case.model, x[:, :before], cache, valid=valid[:, :before])
            mix(case, case.model, factor * noise, cache)
            cache.rollback(torch.full((2,), wrong))
            soil(cache.get(case.node.path), factor)
            parts = torch.split(x[:, before:], step, 1)
            found.append(torch.cat([mix(case, case.model, part, cache) for part in parts], 1))
        wanted = mix(case, case.model, x, valid=valid)[:, before:]
    case.close(found[0], wanted, "after a rollback", terms=before + after)
    case.close(found[1], wanted, "after huge tokens and a rollback", terms=before + after)


def soil(cache: Any, factor: float) -> None:
    """Fills the slots of a token cache that hold no token; another cache's memory is its own matter."""
    if not isinstance(cache, TokenCache):
        return
    free = (cache.orders < 0) | (cache.orders >= cache.lengths[:, None])
    for tensor in cache.tensors.values():
        tensor[free] = factor


@law(
    "mixer",
    "cache-bytes",
    "a cache allocates what the config declares, and its num_bytes says so",
    kills="cache-is-in-float32",
    examples=8,
)
def cache_bytes(case: Case) -> None:
    rows, short, more = case.integer("rows", 1, 3), case.integer("tokens", 1, 9), case.integer("more", 1, 9)
    size = torch.finfo(case.dtype).bits // 8
    told, took = [], []
    for tokens in (short, short + more):
        cache: Any = case.model.new_cache(rows, tokens).get(case.node.path)
        elements = rows * sum(held(node, tokens) for node in case.node.walk())
        case.equal(
            cache.num_bytes, elements * size, f"num_bytes for {elements} declared elements of {size} bytes"
        )
        told.append(cache.num_bytes)
        took.append(sum(each.nbytes for each in tensors_of(cache) if each.dtype not in BOOKKEEPING))
    case.require(took[0] >= told[0], f"holds {took[0]} bytes, and num_bytes says {told[0]}")
    case.equal(
        took[1] - took[0], told[1] - told[0], f"bytes that {more} more tokens take, and what num_bytes says"
    )


BOOKKEEPING = (torch.int64, torch.int32, torch.bool)


def tensors_of(held: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Every tensor that an object holds by attributes and containers, one of each storage; a module's are its own."""
    seen = set() if seen is None else seen
    key = held.untyped_storage().data_ptr() if isinstance(held, Tensor) else id(held)
    if key in seen:
        return []
    seen.add(key)
    if isinstance(held, Tensor):
        return [held]
    if isinstance(held, torch.nn.Module):
        return []
    if isinstance(held, dict):
        inner = list(held.values())
    elif isinstance(held, list | tuple):
        inner = list(held)
    else:
        inner = list(getattr(held, "__dict__", {}).values())
        inner += [getattr(held, name) for name in getattr(type(held), "__slots__", ()) if hasattr(held, name)]
    return [each for one in inner for each in tensors_of(one, seen)]
