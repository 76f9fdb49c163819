"""What generation promises whatever the model: batches, caches, chunks and streams change nothing."""

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composeformer.decoder import Model
from composeformer.generation import Generation, Sampling, generate, stream

few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
prompts = st.lists(st.integers(0, 30), min_size=1, max_size=12)
batches = st.lists(prompts, min_size=1, max_size=4, unique_by=tuple)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.none() | st.just(12),
    top_p=st.none() | st.just(0.9),
    seed=st.integers(0, 99),
)


@few
@given(batches, samplings, st.none() | st.integers(1, 5))
def test_a_batch_gives_what_each_prompt_gives_alone(
    model: Model, batch: list[list[int]], sampling: Sampling, chunk: int | None
) -> None:
    options: Any = {"max_new_tokens": 10, "sampling": sampling, "stop_ids": [7, 8, 9]}
    together = generate(model, batch, prefill_chunk=chunk, **options)
    assert together == [generate(model, [prompt], **options)[0] for prompt in batch]


@few
@given(prompts)
def test_greedy_is_the_argmax_of_full_forwards_without_a_cache(model: Model, prompt: list[int]) -> None:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    (made,) = generate(model, prompt, max_new_tokens=12)
    assert list(made.ids) == ids[len(prompt) :]


@few
@given(prompts, samplings, st.lists(st.text("abcdez<.", min_size=1, max_size=3), max_size=3))
def test_streamed_pieces_joined_are_the_text_of_generate(
    model: Model, letters: Any, prompt: list[int], sampling: Sampling, stop: list[str]
) -> None:
    options: Any = {"tokenizer": letters, "max_new_tokens": 12, "sampling": sampling, "stop": stop}
    (whole,) = generate(model, prompt, **options)
    pieces = list(stream(model, prompt, **options))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(index for piece in pieces for index in piece.ids) == whole.ids
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [whole.finish_reason]
    assert not any(one in str(whole.text) for one in stop)


@few
@given(st.integers(0, 2**40))
def test_a_seed_gives_the_same_ids_and_another_seed_others(model: Model, seed: int) -> None:
    def made(seed: int) -> list[Generation]:
        sampling = Sampling(temperature=2.0, seed=seed)
        return generate(model, [[1, 2], [3]], max_new_tokens=16, sampling=sampling)

    assert made(seed) == made(seed)
    assert made(seed) != made(seed + 1)


def test_equal_prompts_get_different_samples_and_equal_greedy_ids(model: Model) -> None:
    batch = [[5, 6], [5, 6], [5, 6]]
    sampled = generate(model, batch, max_new_tokens=16, sampling=Sampling(temperature=2.0))
    assert len({made.ids for made in sampled}) == 3
    assert len({made.ids for made in generate(model, batch, max_new_tokens=16)}) == 1


def test_inference_mode_does_not_leak_out_of_a_stream(model: Model) -> None:
    for _ in stream(model, [1, 2], max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    # Nothing made in inference mode stays behind in the model.
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    model.zero_grad()
