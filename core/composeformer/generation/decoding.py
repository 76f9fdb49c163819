"""Plain decoding: one forward, one token for every unfinished row.

`read` and `feed` are forwards, `take` chooses tokens from what they gave: over several processes the first are run
by all of them, the last by each for its own rows.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from composeformer.contracts import Phase
from composeformer.decoder import Model
from composeformer.generation.rows import Row
from composeformer.generation.sampling import Sampling, choose
from composeformer.tensors import ModelOutput


@contextmanager
def quiet(model: Model) -> Iterator[None]:
    """Without gradients. It is entered per call: a generator that yielded inside it would leave it on for its consumer.

    Parameters that FSDP2 gathers in inference mode could not be trained after it.
    """
    sharded = model.placement.shard
    with torch.inference_mode(not sharded), torch.no_grad():
        yield


class Decoding:
    """A model's cache over rows of growing length. `ahead` is how many tokens a step may have to forget."""

    ahead = 0

    def __init__(self, model: Model, rows: Sequence[Row], sampling: Sampling) -> None:
        self.model, self.rows, self.sampling = model, rows, sampling
        self.draws = [row.draws for row in rows]
        self.longest = max(len(row.prompt) for row in rows)
        # The last new token is never fed. Beside a row that has ended others may go on, up to `ahead` at a time.
        self.length = self.longest + max(row.room for row in rows) - 1 + 2 * self.ahead
        with quiet(model):
            self.cache = model.new_cache(len(rows), self.length, self.ahead)

    def start(self, chunk: int | None) -> list[str]:
        """Reads the prompts; the rows' first new text."""
        with quiet(self.model):
            return self.take(self.read(chunk))

    def step(self) -> list[str]:
        """One more token for each row, or several; the rows' new text."""
        with quiet(self.model):
            return self.take(self.feed())

    @property
    def live(self) -> bool:
        """Whether a row takes more tokens."""
        return any(row.finish_reason is None for row in self.rows)

    def read(self, chunk: int | None) -> Float[Tensor, "B T V"]:
        """Reads the prompts, at most `chunk` tokens of a row in a forward; the logits behind them."""
        for ids, valid in self.chunks(chunk):
            output = self.forward(ids, valid, "prefill")
        return output.logits

    def feed(self) -> Float[Tensor, "B T V"]:
        """Feeds each row's newest token, a finished row's as padding; the logits behind it."""
        live = [row.finish_reason is None for row in self.rows]
        device = self.model.device
        ids = torch.tensor([[row.ids[-1]] for row in self.rows], device=device)
        valid = None if all(live) else torch.tensor(live, device=device)[:, None]
        return self.forward(ids, valid, "decode").logits

    def num_chunks(self, chunk: int | None) -> int:
        """How many forwards read the prompts."""
        return -(-self.longest // (chunk or self.longest))

    def chunks(self, chunk: int | None) -> Iterator[tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"] | None]]:
        """The prompts, padded on the left, in pieces, and what of them is real."""
        total, device = self.longest, self.model.device
        pads = [total - len(row.prompt) for row in self.rows]
        ids = torch.tensor([[0] * pad + list(row.prompt) for pad, row in zip(pads, self.rows)], device=device)
        real = torch.arange(total, device=device) >= torch.tensor(pads, device=device)[:, None]
        for start in range(0, total, chunk or total):
            part = slice(start, start + (chunk or total))
            yield ids[:, part], real[:, part] if any(pads) else None

    def forward(
        self, ids: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None, phase: Phase, last_only: bool = True
    ) -> ModelOutput:
        """The model over new tokens."""
        output: ModelOutput = self.model(ids, valid=valid, cache=self.cache, last_only=last_only, phase=phase)
        return output

    def take(self, logits: Float[Tensor, "B T V"]) -> list[str]:
        """Chooses a token for each unfinished row, from the last logits; the text that became certain."""
        live = [index for index, row in enumerate(self.rows) if row.finish_reason is None]
        chosen = choose(logits[:, -1], self.sampling, self.draws, [len(row.ids) for row in self.rows], live)
        pieces = [""] * len(self.rows)
        for index, token in zip(live, chosen, strict=True):
            self.rows[index].steps += 1
            pieces[index] = self.rows[index].take(token)
        return pieces
