"""Laws of whole models with a cache: whatever happened to it, each token is as it is without one; and what it holds.

Shapes: B rows, T tokens, V vocabulary.
"""

import random
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from composeformer.contracts import Cache
from composeformer.costs import cost
from composeformer.costs.counts import stated
from composeformer.decoder import Model
from composeformer.errors import InputError
from composeformer.generation import generate
from composeformer.model_cache import ModelCache
from composeformer.testing.models import ModelCase, model_law

LONGEST = 12  # every model drawn serves as many
MOST = 4  # tokens at once


@attrs.define
class Row:
    """What a row holds: its tokens, their documents, the logits that each was given; the longest it has been."""

    ids: list[int] = attrs.field(factory=list)
    documents: list[int] = attrs.field(factory=list)
    logits: list[Tensor] = attrs.field(factory=list)
    longest: int = 0

    def copy(self) -> "Row":
        return Row(list(self.ids), list(self.documents), list(self.logits), self.longest)


def histories() -> st.SearchStrategy[list[list[Any]]]:
    """What happens to a cache: tokens that are appended, forgotten, rows that change places; at last more tokens."""
    appended = st.tuples(st.just("append"), st.integers(1, MOST), st.booleans())
    other = st.tuples(st.sampled_from(["rollback", "reorder"]), st.just(0), st.just(False))
    steps = st.lists(st.tuples(appended, other), min_size=1, max_size=4)
    return st.tuples(steps, appended).map(
        lambda t: [list(each) for pair in t[0] for each in pair] + [list(t[1])]
    )


def appended(
    model: Model,
    cache: ModelCache,
    rows: list[Row],
    tokens: int,
    padded: bool,
    packed: bool,
    dice: random.Random,
) -> None:
    """Appends tokens to every row, of which some are padding."""
    vocabulary = model.spec.model.vocab_size
    shape = len(rows), tokens
    ids = torch.tensor([[dice.randrange(vocabulary) for _ in range(tokens)] for _ in rows]).view(shape)
    valid = torch.tensor([[not padded or dice.random() < 0.6 for _ in range(tokens)] for _ in rows]).view(
        shape
    )
    documents = torch.zeros(shape, dtype=torch.int64)
    for n, row in enumerate(rows):
        last = row.documents[-1] if row.documents else 0
        for t in range(tokens):
            documents[n, t] = last + dice.randrange(2) if valid[n, t] else dice.randrange(5)
            last = int(documents[n, t]) if valid[n, t] else last
    told = {"documents": documents} if packed else {}
    logits = model(ids, valid=valid if padded else None, cache=cache, **told).logits
    for n, row in enumerate(rows):
        for t in range(tokens):
            if valid[n, t]:
                row.ids.append(int(ids[n, t]))
                row.documents.append(int(documents[n, t]))
                row.logits.append(logits[n, t])
        row.longest = max(row.longest, len(row.ids))


def forgotten(cache: ModelCache, rows: list[Row], most: int, dice: random.Random) -> None:
    """Forgets as many tokens of each row as chance wants and the cache may."""
    limits = [max(0, min(len(row.ids), most - row.longest + len(row.ids))) for row in rows]
    counts = [dice.randint(min(limit, dice.randrange(2)), limit) for limit in limits]
    cache.rollback(torch.tensor(counts))
    for row, count in zip(rows, counts, strict=True):
        kept = len(row.ids) - count
        del row.ids[kept:], row.documents[kept:], row.logits[kept:]


@model_law(
    "cached",
    "through a cache, in any pieces, with padding, documents, rollbacks and exchanged rows, a token is as without",
    kills="rollback-leaves-the-lengths",
    examples=30,
)
def cached(case: ModelCase) -> None:
    count, most = case.integer("rows", 1, 4), case.integer("max_rollback", 0, 3)
    packed, history = case.boolean("packed"), case.draw("history", histories())
    dice = random.Random(case.integer("seed of the history", 0, 2**16))
    model, rows = case.model, [Row() for _ in range(count)]
    length = sum(tokens for _, tokens, _ in history)
    with torch.no_grad():
        cache = model.new_cache(count, max(length, 1), most)
        for step, tokens, padded in history:
            if step == "append" and max(len(row.ids) for row in rows) + tokens <= LONGEST:
                appended(model, cache, rows, tokens, padded, packed, dice)
            elif step == "rollback":
                forgotten(cache, rows, most, dice)
            elif step == "reorder":
                order = [
                    dice.randrange(len(rows)) for _ in range(dice.choice([1, 2, 3, len(rows), len(rows)]))
                ]
                cache.reorder(torch.tensor(order))
                rows = [rows[n].copy() for n in order]
    rows = [row for row in rows if row.ids]

    def full(model: Model) -> dict[str, Tensor]:
        found = {}
        with torch.no_grad():
            for n, row in enumerate(rows):
                documents = torch.tensor([row.documents]) if packed else None
                found[f"row {n}"] = model(torch.tensor([row.ids]), documents=documents, predict=False).logits[
                    0
                ]
        return found

    wanted = case.measure(full, model, case.error_in(torch.float64))
    case.agree(
        {f"row {n}": torch.stack(row.logits) for n, row in enumerate(rows)}, wanted, "through the cache"
    )


@model_law(
    "overdrawn",
    "forgetting more tokens than a row has, fewer than none, or more than a cache was made for is refused, and changes"
    " nothing",
    kills="rows-are-forgotten-below-zero",
    examples=12,
)
def overdrawn(case: ModelCase) -> None:
    rows, most = case.integer("rows", 1, 3), case.integer("max_rollback", 1, 4)
    lengths = [case.integer(f"length {n}", 0, 5) for n in range(rows)]
    ids, more = case.ids("ids", rows, max(*lengths, 1)), case.ids("more", rows, 2)
    valid = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    wrong = case.integer("row", 0, rows - 1)
    counts = [case.integer(f"count {n}", 0, min(most, length)) for n, length in enumerate(lengths)]
    allowed = min(most, lengths[wrong])
    counts[wrong] = case.choice("count", [-1, allowed + 1, allowed + 1, most + 1])
    found = []
    for tried in (False, True):
        with torch.no_grad():
            cache = case.model.new_cache(rows, ids.shape[1] + 2, most)
            case.model(ids, valid=valid, cache=cache)
            refused = not tried
            if tried:
                try:
                    cache.rollback(torch.tensor(counts))
                except InputError:
                    refused = True
            case.require(refused, f"rows of {lengths} tokens, of which {most} may go, forget {counts}")
            found.append(case.model(more, cache=cache).logits)
    case.equal(found[1], found[0], f"logits after a refusal to forget {counts} of {lengths}")


@model_law(
    "beyond",
    "more tokens than the model has positions for, a cache of other rows, and ids that there are not are refused",
    kills="a-cache-takes-any-tokens",
    examples=5,
)
def beyond(case: ModelCase) -> None:
    model, sizes = case.model, case.spec.model
    rows, room = case.integer("rows", 1, 2), case.integer("room", 1, 4)
    short, limit = case.ids("ids", rows, room), sizes.max_position_embeddings
    long = torch.zeros(rows, limit + 1, dtype=torch.int64)

    def cache(length: int = room, fed: bool = False) -> ModelCache:
        found = model.new_cache(rows, length)
        if fed:
            model(short, cache=found)
        return found

    packed = torch.zeros_like(short)
    wrong: dict[str, tuple[Tensor, dict[str, Any]]] = {
        f"a row of {limit + 1} tokens, where positions end at {limit}": (long, {}),
        "that row through a cache": (long, {"cache": cache(limit + 1)}),
        f"ids up to {sizes.vocab_size}": (torch.full_like(short, sizes.vocab_size), {}),
        "ids below zero": (torch.full_like(short, -1), {}),
        f"{rows + 1} rows for a cache of {rows}": (short[:1].expand(rows + 1, -1), {"cache": cache()}),
        "documents for a cache that was fed none": (
            short,
            {"cache": cache(2 * room, True), "documents": packed},
        ),
    }
    with torch.no_grad():
        for told, (ids, options) in wrong.items():
            try:
                model(ids, **options, predict=False)
            except InputError:
                continue
            case.require(False, f"{told} are not refused")


@model_law(
    "cache_bytes",
    "a cache takes as many bytes as the parts declare, and grows by no others",
    kills="cache-holds-every-head",
    examples=8,
)
def cache_bytes(case: ModelCase) -> None:
    rows, tokens = case.integer("rows", 1, 3), case.integer("tokens", 1, 9)
    more = tokens + case.integer("more", 1, 9)
    nodes = [layer["mixer"] for layer in case.spec.plan.layers if "mixer" in layer]
    told = [
        each for top in nodes for n in top.walk() for each in stated(n, "decode") if isinstance(each, Cache)
    ]
    width = rows * case.dtype.itemsize
    took, wanted = [], []
    for length in (tokens, more):
        cache = case.model.new_cache(rows, length)
        wanted.append(width * sum(each.elements(length) for each in told))
        took.append(floating_bytes(cache))
        case.equal(cache.num_bytes, wanted[-1], f"num_bytes for {length} tokens")
        counts = cost(case.spec, context=length)
        case.equal(rows * counts.cache_bytes_at_context, wanted[-1], "cache_bytes_at_context")
    # A slot that is never read may be there besides.
    case.require(took[0] >= wanted[0], f"holds {took[0]} bytes, declares {wanted[0]}")
    case.equal(took[1] - took[0], wanted[1] - wanted[0], f"bytes that {more - tokens} more tokens take")
    per_token = cost(case.spec).cache_bytes_per_token
    case.equal(per_token, case.dtype.itemsize * sum(each.per_token for each in told), "cache_bytes_per_token")


def floating_bytes(found: object, seen: set[int] | None = None) -> int:
    """The bytes of every floating-point tensor that an object holds, each once."""
    seen = set() if seen is None else seen
    if id(found) in seen or isinstance(found, str | int | float | bool | None | torch.device | torch.dtype):
        return 0
    seen.add(id(found))
    if isinstance(found, Tensor):
        own = found.is_floating_point() and found.untyped_storage().data_ptr() not in seen
        seen.add(found.untyped_storage().data_ptr())
        return found.untyped_storage().nbytes() if own else 0
    if isinstance(found, dict):
        return sum(floating_bytes(each, seen) for each in found.values())
    if isinstance(found, list | tuple):
        return sum(floating_bytes(each, seen) for each in found)
    return sum(floating_bytes(each, seen) for each in getattr(found, "__dict__", {}).values())


@model_law(
    "generated",
    "greedy text is the best token after each, whether drafted for or not, alone or in a batch",
    kills="every-draft-is-accepted",
    examples=40,
)
def generated(case: ModelCase) -> None:
    model = case.model
    largest = case.spec.model.vocab_size - 1
    prompts = [case.integers(f"prompt {n}", 0, largest) for n in range(case.integer("rows", 1, 2))]
    options: dict[str, Any] = {
        "max_new_tokens": case.integer("new tokens", 1, 7),
        "prefill_chunk": case.choice("prefill_chunk", [None, 1, 2]),
        "speculate": model.predictor is not None and case.boolean("speculate"),
    }
    made = generate(model, prompts, **options)
    for n, (prompt, row) in enumerate(zip(prompts, made, strict=True)):
        ids = torch.tensor([[*prompt, *row.ids]])

        def logits(model: Model, ids: Tensor = ids, start: int = len(prompt)) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"logits": model(ids, predict=False).logits[0, start - 1 : -1]}

        wanted = case.measure(logits, model, case.error_in(torch.float64))
        found = wanted.values["logits"]
        case.equal(len(row.ids), options["max_new_tokens"], f"tokens made for row {n}")
        lost = found.amax(-1) - found.gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        bound = (
            2 * case.error_in(torch.float64) * wanted.conditions.get("logits", 1.0) * float(found.abs().max())
        )
        case.within(float(lost.max()), bound, f"row {n}: what a token made lacks of the best")


@model_law(
    "last",
    "the logits of the last position alone are the last of all, with a cache or without",
    kills="prefill-gives-the-first-logits",
    examples=5,
)
def last(case: ModelCase) -> None:
    model = case.model
    ids = case.ids("ids", case.integer("rows", 1, 3), case.integer("tokens", 1, 6))
    cached = case.boolean("cached")

    def logits(model: Model, only: bool) -> dict[str, Tensor]:
        cache = model.new_cache(*ids.shape) if cached else None
        with torch.no_grad():
            return {"logits": model(ids, cache=cache, last_only=only, predict=False).logits}

    def whole(model: Model) -> dict[str, Tensor]:
        return {"logits": logits(model, False)["logits"][:, -1:]}

    wanted = case.measure(whole, model, case.error_in(torch.float64))
    case.agree(logits(model, True), wanted, "the last position")


@model_law(
    "positions",
    "positions that are given are those that parts see; the counted ones, given, change no bit",
    kills="given-positions-are-counted-anew",
    examples=5,
)
def positions(case: ModelCase) -> None:
    ids, model = case.ids("ids", case.integer("rows", 1, 2), case.integer("tokens", 1, 6)), case.model
    places = [case.integers(f"places {n}", 0, 9, ids.shape[1], ids.shape[1]) for n in range(len(ids))]
    given = torch.tensor(places)
    batch = model.batch(ids, positions=given)
    case.equal(batch.positions, given, "the positions of a batch")
    for key, table in model.rotary(given).items():
        case.equal(batch.tables[key].cos, table.cos, f"the cosines of {key}")
        case.equal(batch.tables[key].sin, table.sin, f"the sines of {key}")
    with torch.no_grad():
        counted = torch.arange(ids.shape[1]).expand_as(ids)
        case.equal(
            model(ids, positions=counted, predict=False).logits,
            model(ids, predict=False).logits,
            "logits with the positions that are counted",
        )
