"""Calling a mixer as a layer does: a plain forward, and any history of a cache beside a record of what it was fed.

Shapes: B rows, T tokens, D hidden size.
"""

from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from composeformer.decoder import Model
from composeformer.model_cache import ModelCache
from composeformer.testing.case import Case, Condition

SHORT, LONG = 9, (33, 65, 130)
ROWS, CHUNK = 3, 4
HUGE = 2.0**40  # products of three stay finite in float32
FARTHEST = 40  # of positions that are given


@st.composite
def _lengths(draw: st.DrawFn, least: int) -> int:
    # Now and then longer than the blocks that kernels and chunked recurrences compute in.
    return draw(st.sampled_from(LONG)) if draw(st.integers(0, 11)) == 11 else draw(st.integers(least, SHORT))


def length(case: Case, label: str, least: int = 1) -> int:
    """A number of tokens: mostly a few, sometimes more than a block."""
    found: int = case.draw(label, _lengths(least))
    return found


def mix(case: Case, model: Model, x: Tensor, cache: ModelCache | None = None, **told: Any) -> Tensor:
    """The mixer of a model over x (B, T, D) as a layer calls it; `told` is what the model would be told."""
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    held = None if cache is None else cache.get(case.node.path)
    found: Tensor = case.part_of(model)(x, model.batch(ids, cache=cache, **told), held).hidden
    if cache is not None:
        cache.advance(ids, told.get("documents"), told.get("valid"))
    return found


def settled(case: Case, rows: int, tokens: int, **told: Any) -> Tensor:
    """A stream to mix, at which the case's condition is known."""
    x = case.stream("x", rows, tokens)
    case.settle(lambda model, y: mix(case, model, y, **told), x)
    return x


def bits(mask: int, rows: int, tokens: int) -> Tensor:
    """Flags (B, T) of a mask: zero is none, and those of a row begin CHUNK bits after those of the one before."""
    flags = [[bool(mask >> (row * CHUNK + token) & 1) for token in range(tokens)] for row in range(rows)]
    return torch.tensor(flags)


@attrs.frozen(kw_only=True)
class Sort:
    """What a history may have in it."""

    rollbacks: bool = False
    reorders: bool = False
    padding: bool = False
    documents: bool = False
    positions: bool = False
    steps: int = 6


Step = dict[str, Any]


@st.composite
def histories(draw: st.DrawFn, sort: Sort) -> list[Step]:
    """Steps in the life of a cache: chunks that it is fed, tokens it forgets, rows that become others."""
    masks = st.integers(0, 2 ** (ROWS * CHUNK) - 1)

    @st.composite
    def feeds(draw: st.DrawFn) -> Step:
        step: Step = {
            "feed": draw(st.integers(1, CHUNK)),
            "phase": draw(st.sampled_from([None, "prefill", "decode"])),
        }
        if sort.padding:
            step["padding"] = draw(st.just(0) | masks)
        if sort.documents:
            step["starts"] = draw(st.just(0) | masks)
        return step

    kinds = [feeds()]
    if sort.rollbacks:
        counts = st.lists(st.integers(0, CHUNK), min_size=ROWS, max_size=ROWS)
        kinds.append(counts.map(lambda found: {"rollback": found}))
    if sort.reorders:
        index = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS)
        kinds.append(index.map(lambda found: {"reorder": found}))
    steps = draw(st.lists(st.one_of(kinds), min_size=1, max_size=sort.steps))
    first = draw(feeds())
    if draw(st.integers(0, 7)) == 7:
        first["feed"] = draw(st.sampled_from(LONG))
    return [first, *steps, draw(feeds())] if len(kinds) > 1 else [first, *steps]


@attrs.define
class Row:
    """What a row's cache stands for: its real tokens so far, and the most it has had."""

    tokens: list[Tensor] = attrs.field(factory=list)
    positions: list[int] = attrs.field(factory=list)
    documents: list[int] = attrs.field(factory=list)
    longest: int = 0

    def add(self, token: Tensor, position: int, document: int) -> None:
        self.tokens.append(token)
        self.positions.append(position)
        self.documents.append(document)
        self.longest = max(self.longest, len(self.tokens))

    def forget(self, count: int, room: int) -> int:
        """Forgets at most `count` tokens, as many as it can; how many those are."""
        count = max(0, min(count, len(self.tokens), room - (self.longest - len(self.tokens))))
        for held in (self.tokens, self.positions, self.documents):
            del held[len(held) - count :]
        return count

    def copy(self) -> "Row":
        return Row([*self.tokens], [*self.positions], [*self.documents], self.longest)


class History:
    """A cache's life beside its record: after each chunk, every new token is compared with its document alone."""

    def __init__(self, case: Case, sort: Sort) -> None:
        self.case = case
        self.steps: list[Step] = case.draw("steps", histories(sort))
        self.room = case.integer("max_rollback", 0, CHUNK)
        self.total = sum(step.get("feed", 0) for step in self.steps)
        size = self.total + case.integer("spare", 0, 3)
        rows = case.integer("rows", 1, ROWS)
        self.x = settled(case, ROWS, self.total)
        self.packed = sort.documents and (not sort.padding or case.boolean("packed"))
        self.given = sort.positions and case.boolean("positions given")
        places = torch.Generator().manual_seed(0)
        self.places = torch.randint(FARTHEST, (ROWS, self.total), generator=places)
        self.cache = case.model.new_cache(rows, size, self.room)
        self.rows = [Row() for _ in range(rows)]
        self.fed = self.numbered = 0

    def run(self) -> None:
        with torch.no_grad():
            for step in self.steps:
                if "feed" in step:
                    self.feed(step)
                elif "rollback" in step:
                    counts = zip(self.rows, step["rollback"], strict=False)
                    self.cache.rollback(torch.tensor([row.forget(n, self.room) for row, n in counts]))
                else:
                    index = [each % len(self.rows) for each in step["reorder"]]
                    self.cache.reorder(torch.tensor(index))
                    self.rows = [self.rows[each].copy() for each in index]

    def feed(self, step: Step) -> None:
        rows, tokens = len(self.rows), step["feed"]
        part = slice(self.fed, self.fed + tokens)
        self.fed += tokens
        x = self.x[:rows, part]
        padding = bits(step.get("padding", 0), rows, tokens)
        told: dict[str, Any] = {"phase": step["phase"]}
        if padding.any():
            told["valid"] = ~padding
        if self.given:
            told["positions"] = self.places[:rows, part]
        documents = self._record(x, padding, bits(step.get("starts", 0), rows, tokens), part)
        if self.packed:
            told["documents"] = documents
        found = mix(
            self.case, self.case.model, x.masked_fill(padding[..., None], torch.nan), self.cache, **told
        )
        for row, record in enumerate(self.rows):
            self._compare(found[row][~padding[row]], record)

    def _record(self, x: Tensor, padding: Tensor, starts: Tensor, part: slice) -> Tensor:
        """Adds the real tokens to the rows' records; the documents (B, T) of all of them."""
        documents = torch.zeros(padding.shape, dtype=torch.int64)
        for row, record in enumerate(self.rows):
            for token in range(x.shape[1]):
                if padding[row, token]:
                    continue
                if not record.documents or starts[row, token]:
                    self.numbered += 1
                    document = self.numbered
                else:
                    document = record.documents[-1]
                documents[row, token] = document
                record.add(x[row, token], int(self.places[row, part][token]), document if self.packed else 0)
        return documents

    def _compare(self, found: Tensor, record: Row) -> None:
        """New tokens' outputs (N, D) against those of their documents alone."""
        new = record.documents[len(record.documents) - len(found) :]
        for document in dict.fromkeys(new):
            own = [place for place, each in enumerate(record.documents) if each == document]
            places = torch.tensor([[record.positions[i] for i in own]])
            told: dict[str, Any] = {"positions": places} if self.given else {}
            alone = torch.stack([record.tokens[i] for i in own])[None]
            wanted = mix(self.case, self.case.model, alone, **told)[0]
            last = [place for place, each in enumerate(new) if each == document]

            def here(alone: Tensor = alone, told: dict[str, Any] = told) -> Condition:
                with torch.enable_grad():
                    return self.case.conditioned(lambda model, x: mix(self.case, model, x, **told), alone)

            self.case.close(
                found[last],
                wanted[len(own) - len(last) :],
                "new tokens beside the whole document",
                terms=len(own),
                scale=float(wanted.abs().max()),
                where=here,
            )
