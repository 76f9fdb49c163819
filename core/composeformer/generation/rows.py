"""One row of a generation: the tokens it was given and made, its text, and why it ended."""

from collections.abc import Sequence
from typing import Literal

import attrs

from composeformer.generation.prompts import TextStream
from composeformer.generation.sampling import Draws
from composeformer.generation.stops import StopText

FinishReason = Literal["stop", "length"]


@attrs.frozen(kw_only=True)
class Generation:
    """What a prompt was continued with.

    `ids` are the new tokens, with the end token or those of the stop string that ended them; `text` is
    without either, and None without a tokenizer. `stopped_by` is that token or string. `steps` counts the
    forwards that gave tokens, `drafted` the drafts that were verified in them, `accepted` those taken.
    """

    ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    stopped_by: int | str | None
    prompt_length: int
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def drafting(self) -> tuple[int, int, int]:
        """Steps, drafts verified and drafts accepted."""
        return self.steps, self.drafted, self.accepted

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that were taken; None where there were none."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_step(self) -> float:
        """New tokens for each forward of the model that gave any."""
        return len(self.ids) / self.steps if self.steps else 0.0


class Row:
    """A row while it is made. It takes tokens until `finish_reason` is set."""

    def __init__(
        self,
        prompt: Sequence[int],
        room: int,
        *,
        draws: Draws,
        decoder: TextStream | None,
        stop: Sequence[str],
        stop_ids: frozenset[int],
    ) -> None:
        """`room` is the most new tokens, `decoder` makes their text."""
        self.prompt, self.room, self.draws = prompt, room, draws
        self._decoder, self._stop_ids = decoder, stop_ids
        self._stops = StopText(stop)
        self._pieces: list[str] = []
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stopped_by: int | str | None = None
        self.steps = self.drafted = self.accepted = 0

    def take(self, token: int) -> str:
        """Adds a token; returns the text that became certain by it."""
        self.ids.append(token)
        piece = ""
        if token in self._stop_ids:
            self.finish_reason, self.stopped_by = "stop", token
        elif self._decoder is not None:
            piece = self._stops.push(self._decoder.push(token))
        if self.finish_reason is None and len(self.ids) >= self.room:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._decoder is not None:
            piece += self._stops.push(self._decoder.finish()) + self._stops.finish()
        if self._stops.stopped is not None:
            self.finish_reason, self.stopped_by = "stop", self._stops.stopped
        self._pieces.append(piece)
        return piece

    def result(self) -> Generation:
        """The finished row."""
        assert self.finish_reason is not None
        return Generation(
            ids=tuple(self.ids),
            text=None if self._decoder is None else "".join(self._pieces),
            finish_reason=self.finish_reason,
            stopped_by=self.stopped_by,
            prompt_length=len(self.prompt),
            steps=self.steps,
            drafted=self.drafted,
            accepted=self.accepted,
        )
