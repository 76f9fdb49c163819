"""Generation: a prefill of left-padded prompts, then steps in which all rows take tokens, in static caches.

A row that has ended keeps its place as padding, which no other row can tell; the loop ends with the last row. Of a
model that is spread over processes, with the last row of them all (`together`).
`stream` is the same loop over one row, so its pieces joined are the text of `generate`.

Shapes: B rows, T tokens of the longest prompt.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import attrs

from composeformer.decoder import Model
from composeformer.errors import InputError, show
from composeformer.generation.decoding import Decoding
from composeformer.generation.prompts import Prompts, Tokenizer, read_prompts
from composeformer.generation.rows import FinishReason, Generation, Row
from composeformer.generation.sampling import Draws, Sampling
from composeformer.generation.speculation import Speculation
from composeformer.generation.together import steps_together

GREEDY = Sampling()


@attrs.frozen(kw_only=True)
class Piece:
    """Text that became certain, with the tokens taken since the last piece; the last one says why it ended.

    Text may wait for tokens and tokens for text: only all pieces together have the ids of all the text.
    `drafting` is how many steps there were so far, drafts verified and drafts accepted.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    drafting: tuple[int, int, int] = (0, 0, 0)


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
    speculate: bool = False,
) -> list[Generation]:
    """Continues each prompt: text, ids, several of either, or a tensor (B, T) of ids without padding.

    A row ends with a stop string, one of `stop_ids` or of the tokenizer's end tokens, or at its length: after
    `max_new_tokens`, or where it comes to `max_length` tokens with its prompt (at most and by default the
    model's max_position_embeddings). What a row gets depends on its prompt, the sampling and its seed, not on
    the others, save that equal prompts get different samples. `prefill_chunk` bounds one forward's tokens.

    With `speculate` the model's predictor drafts tokens, which the model verifies several in a forward: greedy
    text is the same (but where two logits tie within rounding), samples have the same distribution.

    Where the model is spread over processes each calls this (or `stream`), with prompts and options of its own but
    `speculate`, or with no prompt: `[]`.

    Raises InputError for prompts or values that the model can not serve, and for logits that are not finite.
    """
    rows: list[Row] = []

    def prepare() -> Sequence[Row]:
        rows[:] = _rows(
            model, prompts, tokenizer, max_new_tokens, sampling, stop, stop_ids, max_length, prefill_chunk
        )
        return rows

    for _ in _begun(model, prepare, sampling, prefill_chunk, speculate):
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
    speculate: bool = False,
) -> Generator[Piece, None, None]:
    """Continues one prompt as `generate` does, giving text as it becomes certain; without a tokenizer, ids.

    Wrong arguments raise here, not at the first piece. Of a model that is spread over processes a stream is read to
    its end, or closed: others wait for each of its steps.
    """
    rows: list[Row] = []

    def prepare() -> Sequence[Row]:
        rows[:] = _rows(
            model, prompt, tokenizer, max_new_tokens, sampling, stop, stop_ids, max_length, prefill_chunk
        )
        if len(rows) != 1:
            raise InputError(f"stream: takes one prompt, found {len(rows)}")
        return rows

    steps = _begun(model, prepare, sampling, prefill_chunk, speculate)
    return _pieces(rows[0], steps, silent=tokenizer is None)


def _pieces(row: Row, steps: Generator[list[str], None, None], silent: bool) -> Generator[Piece, None, None]:
    given = 0
    with closing(steps):
        for pieces in steps:
            text = pieces[0]
            if text or silent or row.finish_reason is not None:
                drafting = row.steps, row.drafted, row.accepted
                ids = tuple(row.ids[given:])
                yield Piece(text=text, ids=ids, finish_reason=row.finish_reason, drafting=drafting)
                given = len(row.ids)


def _can(model: Model, speculate: bool) -> bool:
    """Raises InputError where drafts are wanted and nothing drafts."""
    if speculate and not all(hasattr(model.predictor, name) for name in ("new_cache", "num_drafts", "draft")):
        has = "has none" if model.predictor is None else "has one that can not draft"
        raise InputError(f"speculate: needs a model with a predictor, and {model.spec.name} {has}")
    return speculate


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
    least = int(model.placement.world.size == 1)
    read = read_prompts(prompts, tokenizer, model.spec.model.vocab_size, limit, what, least)
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


def _begun(
    model: Model,
    prepare: Callable[[], Sequence[Row]],
    sampling: Sampling,
    prefill_chunk: int | None,
    speculate: bool,
) -> Generator[list[str], None, None]:
    """Every unfinished row takes a token, or several, at each step; gives each row's new text.

    What `prepare` finds wrong, before the model runs, is raised here.
    """

    def decoding() -> Decoding | None:
        rows = prepare()
        kind = Speculation if _can(model, speculate) else Decoding
        return kind(model, rows, sampling) if rows else None

    if model.placement.spread:
        return steps_together(model, decoding, prefill_chunk, speculate)
    return _steps(decoding(), prefill_chunk)


def _steps(decoding: Decoding | None, prefill_chunk: int | None) -> Generator[list[str], None, None]:
    if decoding is None:
        return
    yield decoding.start(prefill_chunk)
    while decoding.live:
        yield decoding.step()
