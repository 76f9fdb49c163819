"""Why a generation ends, and what it refuses to begin."""

from typing import Any

import pytest
import torch

from composeformer.decoder import Model
from composeformer.errors import InputError
from composeformer.generation import Sampling, generate, stream

FREE = Sampling(temperature=5.0, seed=2)


def test_an_end_token_ends_its_row_alone_and_is_in_the_ids_not_in_the_text(
    model: Model, letters: Any
) -> None:
    free = generate(model, [[1], [2]], tokenizer=letters, max_new_tokens=12, sampling=FREE)
    end = next(index for index in free[0].ids[2:] if index not in free[1].ids)
    first = free[0].ids.index(end)
    letters.eos_ids = (end,)
    short, long = generate(model, [[1], [2]], tokenizer=letters, max_new_tokens=12, sampling=FREE)
    assert (short.finish_reason, short.stopped_by, short.ids) == ("stop", end, free[0].ids[: first + 1])
    assert free[0].text is not None
    assert short.text is not None
    assert free[0].text.startswith(short.text)
    assert len(short.text) < len(free[0].text)
    assert long == free[1]


def test_a_row_that_has_ended_stays_as_padding(model: Model) -> None:
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, ids, named: seen.append(named["valid"]), with_kwargs=True
    )
    try:
        free = generate(model, [[1], [2]], max_new_tokens=6, sampling=FREE)
        end = next(index for index in free[0].ids[1:4] if index not in free[1].ids[:5])
        seen.clear()
        short, long = generate(model, [[1], [2]], max_new_tokens=6, sampling=FREE, stop_ids=[end])
    finally:
        hook.remove()
    assert 1 < len(short.ids) < len(long.ids) - 1
    live = [[True, True] if valid is None else valid[:, 0].tolist() for valid in seen]
    assert live == [[step < len(short.ids), step < len(long.ids)] for step in range(len(long.ids))]


def test_a_stop_string_is_cut_from_the_text_and_named(model: Model, letters: Any) -> None:
    (free,) = generate(model, "abc", tokenizer=letters, max_new_tokens=12, sampling=FREE)
    assert free.text is not None
    stop = free.text[4:7]
    (made,) = generate(model, "abc", tokenizer=letters, max_new_tokens=12, sampling=FREE, stop=["??", stop])
    assert (made.finish_reason, made.stopped_by) == ("stop", stop)
    assert made.text == free.text[: free.text.index(stop)]
    assert made.ids == free.ids[: len(made.ids)]


def test_a_stop_string_that_only_the_end_completes_still_stops(model: Model, letters: Any) -> None:
    """Half a letter comes out when nothing follows it."""
    letters.stream = lambda skip_special=False: _Held()
    (made,) = generate(model, [1], tokenizer=letters, max_new_tokens=3, stop=["!"])
    assert (made.text, made.finish_reason, made.stopped_by) == ("", "stop", "!")


class _Held:
    def push(self, index: int) -> str:
        return ""

    def finish(self) -> str:
        return "!rest"


def test_a_row_ends_where_it_comes_to_the_longest_length(model: Model) -> None:
    limit = model.spec.model.max_position_embeddings
    long, short = generate(model, [[1] * (limit - 3), [1, 2]], max_new_tokens=8)
    assert (len(long.ids), long.finish_reason, long.prompt_length) == (3, "length", limit - 3)
    assert (len(short.ids), short.finish_reason) == (8, "length")
    assert long.ids == generate(model, [1] * (limit - 3), max_new_tokens=3)[0].ids
    assert len(generate(model, [1, 2], max_new_tokens=8, max_length=5)[0].ids) == 3


def test_without_a_tokenizer_there_is_no_text_and_every_token_is_a_piece(model: Model) -> None:
    assert generate(model, [3], max_new_tokens=2)[0].text is None
    assert [(len(p.ids), p.text) for p in stream(model, [3], max_new_tokens=4)] == [(1, "")] * 4


def test_prompts_are_text_ids_several_or_a_tensor(model: Model, letters: Any) -> None:
    expected = generate(model, [[1, 2, 3]], max_new_tokens=4)[0].ids
    forms: list[Any] = [
        "abc",
        ["abc"],
        [1, 2, 3],
        [[1, 2, 3]],
        torch.tensor([[1, 2, 3]]),
        torch.tensor([1, 2, 3]),
    ]
    for prompt in forms:
        (made,) = generate(model, prompt, tokenizer=letters, max_new_tokens=4)
        assert (made.ids, made.prompt_length) == (expected, 3)


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ([1] * 40, "prompt: 40 tokens leave no room to continue: max_position_embeddings is 40"),
        ([[1], [2, 31]], "prompt 1: token 31 at position 1: must be an id from 0 to 30"),
        ([[1], [-1]], "prompt 1: token -1 at position 0: must be an id from 0 to 30"),
        ([[1.5]], "prompt: token 1.5 at position 0: must be an id from 0 to 30"),
        ([[1], []], "prompt 1: is empty: it has no tokens"),
        ("", "prompt: is empty: it has no tokens"),
        ([], "there is no prompt"),
        ([[1], 7], "prompt 1: must be text or a list of token ids, found int"),
        ({"a": 1}, "prompts: must be text, ids or several of either, found dict"),
        (torch.ones(1, 2), "prompts: a tensor must hold integer ids (B, T), found float32 (1, 2)"),
        (torch.ones(1, 2, 2).long(), "prompts: a tensor must hold integer ids (B, T), found int64 (1, 2, 2)"),
    ],
)
def test_a_prompt_that_can_not_be_served_is_one_clear_line(
    model: Model, letters: Any, prompt: Any, line: str
) -> None:
    with pytest.raises(InputError) as caught:
        generate(model, prompt, tokenizer=letters)
    assert str(caught.value) == line


def test_every_bad_prompt_is_told(model: Model) -> None:
    with pytest.raises(InputError) as caught:
        generate(model, [[], [1], [99], "text"])
    assert [line.split(":")[0] for line in caught.value.lines] == ["prompt 0", "prompt 2", "prompt 3"]


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be an integer >= 1"),
        ({"max_length": 41}, "max_length = 41: must be <= max_position_embeddings (40)"),
        ({"max_length": 2}, "prompt: 2 tokens leave no room to continue: max_length is 2"),
        ({"prefill_chunk": -1}, "prefill_chunk = -1: must be an integer >= 1"),
        ({"stop_ids": ["a"]}, 'stop_ids: "a": must be token ids'),
        ({"stop": ["a"]}, "stop: stop strings need a tokenizer, and this model has none; give stop_ids"),
    ],
)
def test_a_bad_option_is_one_clear_line_also_from_a_stream(model: Model, options: Any, start: str) -> None:
    for call in (generate, stream):
        with pytest.raises(InputError) as caught:
            call(model, [1, 2], **options)
        assert str(caught.value) == start


def test_a_stream_takes_one_prompt(model: Model) -> None:
    with pytest.raises(InputError, match="stream: takes one prompt, found 2"):
        stream(model, [[1], [2]])


def test_damaged_weights_are_told_as_such(model: Model) -> None:
    norm = next(parameter for name, parameter in model.named_parameters() if "residual" in name)
    kept = norm.detach().clone()
    with torch.no_grad():
        norm[0] = float("nan")
    try:
        with pytest.raises(InputError, match=r"not finite \(nan\): the weights are likely damaged"):
            generate(model, [1, 2])
    finally:
        with torch.no_grad():
            norm.copy_(kept)
