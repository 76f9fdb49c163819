"""Generation: a prefill of left-padded prompts, then one token a step for all rows, in static caches.

A row that has ended keeps its place as padding, which no other row can tell; the loop ends with the last row.
`stream` is the same loop over one row, so its pieces joined are the text of `generate`.

Shapes: B rows, T tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from composeformer.contracts import Phase
from composeformer.decoder import Model
from composeformer.errors import InputError, show
from composeformer.generation.prompts import Prompts, Tokenizer, read_prompts
from composeformer.generation.rows import FinishReason, Generation, Row
from composeformer.generation.sampling import Draws, Sampling, choose
from composeformer.tensors import ModelOutput

GREEDY = Sampling()


@attrs.frozen(kw_only=True)
class Piece:
    """Text that became certain, with the tokens taken since the last piece; the last one says why it ended.

    Text may wait for tokens and tokens for text: only all pieces together have the ids of all the text.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


def generate(
    model: Model,
    prompts: Prompts,
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    max_length: int | None = None,
    prefill_chunk: int | None = None,
) -> list[Generation]:
    """Continues each prompt: text, ids, several of either, or a tensor (B, T) of ids without padding.

    A row ends with a stop string, one of `stop_ids` or of the tokenizer's end tokens, or at its length: after
    `max_new_tokens`, or where it comes to `max_length` tokens with its prompt (at most and by default the
    model's max_position_embeddings). What a row gets depends on its prompt, the sampling and its seed, not on
    the others, save that equal prompts get different samples. `prefill_chunk` bounds one forward's tokens.

    Raises InputError for prompts or values that the model can not serve, and for logits that are not finite.
    """
    rows = _rows(
        model, prompts, tokenizer, max_new_tokens, sampling, stop, stop_ids, max_length, prefill_chunk
    )
    for _ in _steps(model, rows, sampling, prefill_chunk):
        pass
    return [row.result() for row in rows]


def stream(
    model: Model,
    prompt: Prompts,
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    max_length: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Piece]:
    """Continues one prompt as `generate` does, giving text as it becomes certain; without a tokenizer, ids.

    Wrong arguments raise here, not at the first piece.
    """
    rows = _rows(
        model, prompt, tokenizer, max_new_tokens, sampling, stop, stop_ids, max_length, prefill_chunk
    )
    if len(rows) != 1:
        raise InputError(f"stream: takes one prompt, found {len(rows)}")
    return _pieces(model, rows[0], sampling, prefill_chunk, silent=tokenizer is None)


def _pieces(
    model: Model, row: Row, sampling: Sampling, prefill_chunk: int | None, silent: bool
) -> Iterator[Piece]:
    given = 0
    for pieces in _steps(model, [row], sampling, prefill_chunk):
        text = pieces[0]
        if text or silent or row.finish_reason is not None:
            yield Piece(text=text, ids=tuple(row.ids[given:]), finish_reason=row.finish_reason)
            given = len(row.ids)


def _rows(
    model: Model,
    prompts: Prompts,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    stop_ids: Sequence[int],
    max_length: int | None,
    prefill_chunk: int | None,
) -> list[Row]:
    """Everything that can be wrong is found here, before the model runs."""
    positions = model.spec.model.max_position_embeddings
    counts = {"max_new_tokens": max_new_tokens, "max_length": max_length, "prefill_chunk": prefill_chunk}
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{name} = {show(value)}: must be an integer >= 1")
    if max_length is not None and max_length > positions:
        raise InputError(f"max_length = {max_length}: must be <= max_position_embeddings ({positions})")
    for token in stop_ids:
        if type(token) is not int or token < 0:
            raise InputError(f"stop_ids: {show(token)}: must be token ids")
    if stop and tokenizer is None:
        raise InputError("stop: stop strings need a tokenizer, and this model has none; give stop_ids")
    limit, what = (positions, "max_position_embeddings") if max_length is None else (max_length, "max_length")
    read = read_prompts(prompts, tokenizer, model.spec.model.vocab_size, limit, what)
    ends = frozenset(stop_ids) | frozenset(tokenizer.eos_ids if tokenizer is not None else ())
    seen: dict[tuple[int, ...], int] = {}
    rows = []
    for ids in read:
        copy = seen[tuple(ids)] = seen.get(tuple(ids), -1) + 1
        rows.append(
            Row(
                ids,
                min(max_new_tokens, limit - len(ids)),
                draws=Draws(sampling.seed, ids, copy),
                decoder=None if tokenizer is None else tokenizer.stream(skip_special=True),
                stop=stop,
                stop_ids=ends,
            )
        )
    return rows


def _steps(
    model: Model, rows: Sequence[Row], sampling: Sampling, prefill_chunk: int | None
) -> Iterator[list[str]]:
    """Takes one token for every unfinished row at each step; gives each row's new text."""
    decoding = _Decoding(model, rows)
    logits = decoding.prefill(prefill_chunk)
    draws = [row.draws for row in rows]
    while True:
        live = [index for index, row in enumerate(rows) if row.finish_reason is None]
        chosen = choose(logits, sampling, draws, [len(row.ids) for row in rows], live)
        pieces = [""] * len(rows)
        for index, token in zip(live, chosen, strict=True):
            pieces[index] = rows[index].take(token)
        yield pieces
        if all(row.finish_reason is not None for row in rows):
            return
        logits = decoding.next()


class _Decoding:
    """A model's cache over rows of growing length. Inference mode is entered per call: a generator that
    yielded inside it would leave it on for its consumer.
    """

    def __init__(self, model: Model, rows: Sequence[Row]) -> None:
        self._model, self._rows = model, rows
        self._longest = max(len(row.prompt) for row in rows)
        # The last new token is never fed.
        length = self._longest + max(row.room for row in rows) - 1
        with torch.inference_mode():
            self._cache = model.new_cache(len(rows), length)

    @torch.inference_mode()
    def prefill(self, chunk: int | None) -> Float[Tensor, "B V"]:
        """Feeds the prompts, padded on the left; logits after their last tokens."""
        total, device = self._longest, self._model.device
        pads = [total - len(row.prompt) for row in self._rows]
        ids = torch.tensor(
            [[0] * pad + list(row.prompt) for pad, row in zip(pads, self._rows)], device=device
        )
        real = torch.arange(total, device=device) >= torch.tensor(pads, device=device)[:, None]
        for start in range(0, total, chunk or total):
            part = slice(start, start + (chunk or total))
            logits = self._forward(ids[:, part], real[:, part] if any(pads) else None, "prefill")
        return logits

    @torch.inference_mode()
    def next(self) -> Float[Tensor, "B V"]:
        """Feeds each row's newest token; a finished row's as padding."""
        live = [row.finish_reason is None for row in self._rows]
        device = self._model.device
        ids = torch.tensor([[row.ids[-1]] for row in self._rows], device=device)
        valid = None if all(live) else torch.tensor(live, device=device)[:, None]
        return self._forward(ids, valid, "decode")

    def _forward(self, ids: Tensor, valid: Tensor | None, phase: Phase) -> Tensor:
        output: ModelOutput = self._model(ids, valid=valid, cache=self._cache, last_only=True, phase=phase)
        return output.logits[:, -1]
