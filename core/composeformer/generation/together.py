"""Generation by processes that share a model: all run as many forwards, in the same order, whatever rows each has.

Every forward of a model that is spread is a meeting of its processes. So they agree on the arguments, on how many
forwards read the prompts, and after each step on whether any row goes on: one small all-reduce. Who has no row, or
none left, takes part with a token of padding, which reaches no expert. A predictor drafts only behind something: to its
experts goes one token of such a process.

What a process finds wrong with its rows ends all of them, at the next agreement, with the same lines.
"""

from collections.abc import Callable, Generator
from functools import partial
from typing import TypeVar

import torch

from composeformer.contracts import Phase
from composeformer.decoder import Model
from composeformer.errors import ComposeError, InputError
from composeformer.generation.decoding import Decoding, quiet
from composeformer.generation.speculation import drafts
from composeformer.parallel import World

T = TypeVar("T")

DONE, GOING, FAILED = range(3)


def steps_together(
    model: Model, prepare: Callable[[], Decoding | None], chunk: int | None, speculate: bool
) -> Generator[list[str], None, None]:
    """The new text of this process's rows at each step that takes tokens for them.

    `prepare` checks this process's arguments; it gives None where there is no row. Raises InputError, before any
    forward, in every process: for what `prepare` raises in one, where some draft and some do not, or none has a row.
    """
    world = model.placement.world
    decoding, wrong = _tried(prepare)
    speculate = bool(speculate)
    number = 0 if decoding is None else decoding.num_chunks(chunk)
    told = torch.tensor([wrong is not None, number, speculate, -int(speculate)], device=world.device)
    failed, most, any_drafts, none_drafts = world.largest(told).tolist()
    if failed:
        _fail(world, wrong)
    if any_drafts != -none_drafts:
        raise InputError("speculate: is set in some processes alone; all that share a model draft, or none does")
    if not most:
        raise InputError("there is no prompt, in any process")
    return _Together(model, decoding, speculate).run(chunk, most - number)


class _Together:
    """One process's part. Without a decoding it only takes part in what others do."""

    def __init__(self, model: Model, decoding: Decoding | None, speculate: bool) -> None:
        self.model, self.decoding, self.speculate = model, decoding, speculate

    def run(self, chunk: int | None, more: int) -> Generator[list[str], None, None]:
        """`more` is how many forwards others read prompts by beyond this process's own."""
        decoding, logits = self.decoding, None
        with quiet(self.model):
            if decoding is not None:
                logits = decoding.read(chunk)
            for number in range(more):
                self._beside("prefill", drafts_too=decoding is not None or number > 0)
        while True:
            pieces, wrong = None, None
            if decoding is not None and logits is not None:
                with quiet(self.model):
                    pieces, wrong = _tried(partial(decoding.take, logits))
            going = self._agree(wrong)
            if pieces is not None:
                try:
                    yield pieces
                except GeneratorExit:
                    # Who wants no more of a stream must not keep the others from their text.
                    self._leave(going)
                    raise
            if not going:
                return
            logits = None
            with quiet(self.model):
                if decoding is not None and decoding.live:
                    logits = decoding.feed()
                else:
                    self._beside("decode")

    def _agree(self, wrong: Exception | None) -> bool:
        """Whether a row goes on anywhere. Raises where a process can not go on."""
        world = self.model.placement.world
        live = self.decoding is not None and self.decoding.live
        told = torch.tensor(FAILED if wrong is not None else GOING if live else DONE, device=world.device)
        found = int(world.largest(told))
        if found == FAILED:
            _fail(world, wrong)
        return found == GOING

    def _leave(self, going: bool) -> None:
        self.decoding = None
        while going:
            with quiet(self.model):
                self._beside("decode")
            going = self._agree(None)

    def _beside(self, phase: Phase, drafts_too: bool = True) -> None:
        """A step of others: the same parts of the model, over nothing."""
        model, device = self.model, self.model.device
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        if self.speculate and drafts_too:
            hidden = torch.zeros(1, 1, model.spec.model.hidden_size, dtype=model.activations, device=device)
            cache = model.predictor.new_cache(1, 1)
            drafts(model, hidden, ids, None, cache, lambda _, logits: logits.argmax(-1))
        model(ids, valid=torch.zeros_like(ids, dtype=torch.bool), last_only=True, phase=phase)


def _tried(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return call(), None
    except Exception as error:
        return None, error


def _fail(world: World, wrong: Exception | None) -> None:
    """Raises what is wrong anywhere, in every process; each calls it with its own, or None."""
    lines: tuple[str, ...] = ()
    if wrong is not None:
        lines = wrong.lines if isinstance(wrong, ComposeError) else (f"{type(wrong).__name__}: {wrong}",)
    told = world.every("\n".join(" ".join(line.split()) for line in lines))
    if wrong is not None and not isinstance(wrong, ComposeError):
        raise wrong
    if len(set(told)) == 1:
        raise InputError(*told[0].split("\n"))
    raise InputError(
        *(f"process {rank}: {line}" for rank, text in enumerate(told) if text for line in text.split("\n"))
    )
