"""Speculative decoding: the predictor drafts tokens, and one forward of the model verifies all of them.

Greedy, a draft is taken while it is the model's own choice; then the model's choice follows. Sampling, a draft d
of the predictor's distribution q is taken with probability min(1, p(d) / q(d)), else a token is drawn from what
p has more than q: so tokens have the model's distribution p, whatever q is. Source: arXiv 2211.17192,
algorithm 1. Both p and q are behind the sampling's temperature and filters.

Each row takes as many drafts as are right for it, and forgets the others alone. A step drafts first, from what the
one before it left in `_unread`.

Shapes: B rows, K drafts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from composeformer.decoder import Model
from composeformer.errors import InputError
from composeformer.generation.decoding import Decoding, quiet
from composeformer.generation.rows import Row
from composeformer.generation.sampling import (
    Candidates,
    Draws,
    Sampling,
    candidates,
    check_finite,
    not_finite,
    pick,
)


class Speculation(Decoding):
    """Decoding with drafts."""

    def __init__(self, model: Model, rows: Sequence[Row], sampling: Sampling) -> None:
        self.ahead = model.predictor.num_drafts
        super().__init__(model, rows, sampling)
        with quiet(model):
            self.drafting = model.predictor.new_cache(len(rows), self.length)
        self._fed: list[int] | None = None  # how many tokens of each row; None: the prompts
        self._hidden: Tensor
        self._ids: Tensor  # (B, T), what was fed last
        self._real: Tensor | None
        # What the predictor is to read next: hidden states, the tokens that follow them, which are real.
        self._unread: tuple[Tensor, Tensor, Tensor | None]
        # What is wrong with drafts is told behind the forward: over several processes all run it.
        self._wrong: InputError | None = None
        self._drafts: list[list[int]] = []
        self._drafted_from: list[list[Candidates]] = []  # of each row, where it samples

    def read(self, chunk: int | None) -> Float[Tensor, "B T V"]:
        """Reads the prompts, also into the predictor but for their last part; the logits behind them."""
        read = False
        for ids, valid in self.chunks(chunk):
            if read:
                # What follows a chunk's last token is the next one's first.
                following = torch.cat([self._ids[:, 1:], ids[:, :1]], 1)
                self._read(self._hidden, following, self._real)
            output = self.forward(ids, valid, "prefill")
            self._hidden, self._ids, self._real, read = output.hidden, ids, valid, True
        return output.logits

    def feed(self) -> Float[Tensor, "B K+1 V"]:
        """Drafts, then feeds each row's newest token and its drafts; the logits behind each."""
        device = self.model.device
        self._draft(*self._unread)
        self._fed = fed = [self._room(row) for row in self.rows]
        self._ids = torch.tensor(
            [[row.ids[-1], *drafts] for row, drafts in zip(self.rows, self._drafts)], device=device
        )
        valid = None
        if min(fed) <= self.ahead:
            columns = torch.arange(self.ahead + 1, device=device)
            valid = columns < torch.tensor(fed, device=device)[:, None]
        output = self.forward(self._ids, valid, "decode", last_only=False)
        self._hidden = output.hidden
        return output.logits

    def take(self, logits: Float[Tensor, "B T V"]) -> list[str]:
        """The tokens that each unfinished row takes; the text that became certain."""
        if self._wrong is not None:
            raise self._wrong
        if self._fed is None:
            pieces = super().take(logits)
            if self.live:
                newest = torch.tensor([[row.ids[-1]] for row in self.rows], device=self.model.device)
                following = torch.cat([self._ids[:, 1:], newest], 1)
                self._unread = self._hidden, following, self._unfinished(self._real, following.shape)
            return pieces
        pieces, fed, device = [""] * len(self.rows), self._fed, self.model.device
        taken = self._verify(logits, fed)
        for index, (row, tokens) in enumerate(zip(self.rows, taken, strict=True)):
            row.steps += bool(tokens)
            for k, token in enumerate(tokens):
                if row.finish_reason is None:
                    # All but the last are drafts that were right; what follows an end is not taken.
                    row.drafted += k + 1 < fed[index]
                    row.accepted += k + 1 < len(tokens)
                    pieces[index] += row.take(token)
        kept = torch.tensor([len(tokens) for tokens in taken], device=device)
        self.cache.rollback(torch.tensor(fed, device=device) - kept)
        if self.live:
            following = torch.tensor(
                [[*tokens, *[0] * (self.ahead + 1 - len(tokens))] for tokens in taken], device=device
            )
            real = torch.arange(self.ahead + 1, device=device) < kept[:, None]
            self._unread = self._hidden, following, self._unfinished(real, following.shape)
        return pieces

    def _room(self, row: Row) -> int:
        """How many tokens are fed for a row: the last one taken is never fed."""
        return min(self.ahead + 1, row.room - len(row.ids)) if row.finish_reason is None else 0

    def _unfinished(self, real: Tensor | None, shape: Sequence[int]) -> Bool[Tensor, "B T"] | None:
        """`real` without the rows that have ended."""
        live = [row.finish_reason is None for row in self.rows]
        if all(live):
            return real
        rows = torch.tensor(live, device=self.model.device)[:, None]
        return rows.expand(*shape) if real is None else real & rows

    def _read(self, hidden: Tensor, following: Tensor, valid: Tensor | None) -> None:
        """A part of the prompts into the predictor, whose drafts nobody needs."""
        choose = lambda _, logits: logits.argmax(-1)  # noqa: E731
        drafts(self.model, hidden, following, valid, self.drafting, choose)

    def _draft(
        self, hidden: Float[Tensor, "B T D"], following: Int[Tensor, "B T"], valid: Tensor | None
    ) -> None:
        """Drafts for every unfinished row; the others' are zeros."""
        self._drafted_from = [[] for _ in self.rows]
        steps = [len(row.ids) for row in self.rows]

        def choose(k: int, logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
            for index, largest in enumerate(logits.amax(-1).tolist()):
                if self.rows[index].finish_reason is None and self._wrong is None:
                    self._wrong = not_finite(largest, index, steps[index] + k, "draft of ")
            if self.sampling.greedy or self._wrong is not None:
                return logits.argmax(-1)
            chosen = [0] * len(self.rows)
            for index, (row, of_row) in enumerate(zip(self.rows, logits.to("cpu"), strict=True)):
                if row.finish_reason is None:
                    self._drafted_from[index].append(candidates(of_row, self.sampling))
                    uniform = row.draws.uniform(steps[index] + k, b"draft")
                    chosen[index] = pick(self._drafted_from[index][k], uniform)
            return torch.tensor(chosen, device=logits.device)

        self._drafts = drafts(self.model, hidden, following, valid, self.drafting, choose).tolist()

    def _verify(self, logits: Float[Tensor, "B K+1 V"], fed: Sequence[int]) -> list[list[int]]:
        """The tokens that each row takes: right drafts and one of the model's own; none for a finished row."""
        largest, best = logits.amax(-1).tolist(), logits.argmax(-1).tolist()
        host = None if self.sampling.greedy else logits.to("cpu")
        taken: list[list[int]] = []
        for index, row in enumerate(self.rows):
            tokens: list[int] = []
            for k in range(fed[index]):
                step = len(row.ids) + k
                check_finite(largest[index][k], index, step)
                drafted = k + 1 < fed[index]
                draft = self._drafts[index][k] if drafted else None
                if host is None:
                    token = best[index][k]
                else:
                    drafted_from = self._drafted_from[index][k] if drafted else None
                    kept = candidates(host[index, k], self.sampling)
                    token = accept(kept, draft, drafted_from, row.draws, step)
                tokens.append(token)
                if token != draft:
                    break
            taken.append(tokens)
        return taken


def drafts(
    model: Model,
    hidden: Float[Tensor, "B T D"],
    following: Int[Tensor, "B T"],
    valid: Bool[Tensor, "B T"] | None,
    cache: Any,
    choose: Callable[[int, Float[Tensor, "B V"]], Int[Tensor, " B"]],
) -> Int[Tensor, "B K"]:
    """The predictor's drafts behind hidden states of the model and the tokens that follow them."""
    # It calls the model's embedding and head, outside of any forward.
    with model.placement.gathered(model, model.predictor):
        found: Tensor = model.predictor.draft(hidden, following, valid, cache, model.rotary, choose)
    return found


def accept(
    kept: Candidates, draft: int | None, drafted_from: Candidates | None, draws: Draws, step: int
) -> int:
    """A token distributed as `kept`: the draft, if it is taken; it was drawn from `drafted_from`."""
    if draft is None or drafted_from is None:
        return pick(kept, draws.uniform(step))
    wanted, offered = _probability(kept, draft), _probability(drafted_from, draft)
    if draws.uniform(step, b"accept") * offered < wanted:
        return draft
    less = torch.zeros(int(max(kept.ids[-1], drafted_from.ids[-1])) + 1, dtype=torch.float64)
    less[drafted_from.ids] = drafted_from.probabilities
    left = (kept.probabilities - less[kept.ids]).clamp(min=0)
    # Rounding can leave nothing where both distributions are equal.
    return pick(Candidates(kept.ids, left) if float(left.sum()) > 0 else kept, draws.uniform(step))


def _probability(of: Candidates, token: int) -> float:
    found = (of.ids == token).nonzero()
    return float(of.probabilities[found[0, 0]]) if len(found) else 0.0
