"""Processes that share a model make together what each prompt gets of it in one, whatever prompts each has."""

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch

# What ranks import is imported before they are forked: PyTorch's compiler, which its sharded tensors load, takes
# seconds.
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
from hypothesis import given, settings
from hypothesis import strategies as st

import composeformer as cf
import composeformer.parallel.sharding
from composeformer.decoder import Model
from composeformer.errors import ComposeError, InputError
from composeformer.generation import Generation, Sampling, generate, stream
from composeformer.parallel.pieces import is_shard
from composeformer.spec import Spec
from composeformer.testing.ranks import on_ranks
from composeformer.train import TokenBatch, train_step, trainer

# Few enough tokens that an untrained predictor is right at times.
VOCAB = 7
MODEL: dict[str, Any] = {
    "model": {"vocab_size": VOCAB, "hidden_size": 16, "max_position_embeddings": 40, "init_std": 0.3},
    "norm": {"kind": "rmsnorm"},
    "position": {"kind": "rope"},
    "mixer": {
        "latent": {
            "kind": "mla",
            "num_heads": 2,
            "q_lora_rank": 6,
            "kv_lora_rank": 5,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 4,
        },
        "near": {"kind": "gqa", "num_heads": 2, "window": 4},
    },
    "ffn": {
        "dense": {"kind": "swiglu", "intermediate_size": 11},
        "experts": {
            "kind": "moe",
            "num_experts": 8,
            "num_shared_experts": 1,
            "intermediate_size": 8,
            "router": {"kind": "sigmoid-bias", "top_k": 2},
        },
    },
    "layers": [{"mixer": "latent", "ffn": "dense"}, {"mixer": "near", "ffn": "experts"}],
    "predictor": {"kind": "mtp", "depth": 2, "layer": {"mixer": "latent", "ffn": "experts"}},
    "precision": {"kind": "full", "dtype": "float64"},
    "comm": {"kind": "collective"},
    # Steps that rounding can not turn round.
    "optimizer": {"kind": "adamw", "eps": 1e-3},
    "train": {"learning_rate": 0.05},
}
# Processes, those that share the experts, whether the rest is sharded.
LAYOUTS = ((1, 1, True), (2, 1, True), (2, 2, False), (4, 2, True), (4, 4, False))


def spec(experts: int = 1, shard: bool = True, **changes: Any) -> Spec:
    found = Spec.from_dict(MODEL).with_({"parallel": {"expert": experts, "shard": shard}})
    return found.with_(changes) if changes else found


@st.composite
def brings(draw: st.DrawFn) -> dict[str, Any]:
    """What one process calls `generate` with."""
    prompt = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8)
    return {
        "prompts": draw(st.lists(prompt, max_size=3)),
        "max_new_tokens": draw(st.integers(1, 9)),
        "prefill_chunk": draw(st.none() | st.integers(1, 4)),
        "stop_ids": draw(st.lists(st.integers(0, VOCAB - 1), max_size=1)),
        "sampling": Sampling(temperature=draw(st.sampled_from([0.0, 0.0, 1.0])), seed=draw(st.integers(0, 9))),
    }


def calls(size: int) -> st.SearchStrategy[list[dict[str, Any]]]:
    """What each of the processes brings to one call; some process has a prompt."""
    processes = st.lists(brings(), min_size=size, max_size=size)
    return processes.filter(lambda each: any(bring["prompts"] for bring in each))


def made(model: Model, bring: dict[str, Any], **more: Any) -> list[Generation]:
    return generate(model, **(bring | more)) if bring["prompts"] or model.placement.world.size > 1 else []


@pytest.fixture(scope="module")
def alone() -> Model:
    return cf.build(spec(), seed=3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_row_is_that_of_one_process(layout: tuple[int, int, bool], alone: Model) -> None:
    size, experts, shard = layout

    @settings(max_examples=1, deadline=None)
    @given(st.lists(calls(size), min_size=4, max_size=4))
    def check(plan: list[list[dict[str, Any]]]) -> None:
        def run(rank: int) -> list[list[Generation]]:
            model = cf.build(spec(experts, shard), seed=3)
            return [made(model, call[rank], speculate=n > 1) for n, call in enumerate(plan)]

        together = on_ranks(size, run)
        for n, call in enumerate(plan):
            found = [each[n] for each in together]
            assert found == [made(alone, bring, speculate=n > 1) for bring in call]

    check()


def test_all_processes_run_as_many_forwards_and_the_idle_ones_over_one_token(alone: Model) -> None:
    bring: list[Any] = [[[1, 2, 3, 4, 5], [6]], [], [[2]]]
    new = [7, 5, 2]

    def run(rank: int) -> list[tuple[int, int, int]]:
        model = cf.build(spec(), seed=3)
        seen: list[tuple[int, int, int]] = []

        def note(_: Any, ids: Any, named: Any) -> None:
            valid = named["valid"]
            seen.append((*ids[0].shape, ids[0].numel() if valid is None else int(valid.sum())))

        model.register_forward_pre_hook(note, with_kwargs=True)
        generate(model, bring[rank], max_new_tokens=new[rank], prefill_chunk=2)
        return seen

    first, second, third = on_ranks(3, run)
    # Three forwards read the first one's prompts; then the last of seven tokens is not fed.
    assert first == [(2, 2, 2), (2, 2, 2), (2, 1, 2), *[(2, 1, 2)] * 6]
    assert second == [(1, 1, 0)] * 9
    assert third == [(1, 1, 1), (1, 1, 0), (1, 1, 0), (1, 1, 1), *[(1, 1, 0)] * 5]


@pytest.mark.parametrize("inference", [False, True])
def test_a_sharded_model_trains_after_it_has_generated_and_generates_after_training(inference: bool) -> None:
    batch = TokenBatch(torch.tensor([[1, 2, 3, 4, 5]]))
    options: Any = {"max_new_tokens": 6, "speculate": True}

    def run(rank: int, shard: bool = True) -> tuple[Any, ...]:
        model = cf.build(spec(2, shard), seed=3)
        parts = trainer(model)
        with torch.inference_mode(inference):
            before = generate(model, [[rank]], **options)
        losses = [train_step(model, [batch], *parts, step=n).loss for n in range(2)]
        assert is_shard(next(model.predictor.parameters())) == shard
        return before, losses, generate(model, [[rank], [3, 2]], **options)

    found = on_ranks(2, run)
    assert any(before != after[:1] for before, _, after in found)
    model = cf.build(spec(), seed=3)
    parts = trainer(model)
    expected = [generate(model, [[rank]], **options) for rank in range(2)]
    losses = [train_step(model, [batch, batch], *parts, step=n).loss for n in range(2)]
    for rank, (before, its, after) in enumerate(found):
        assert before == expected[rank]
        assert its == pytest.approx(losses, rel=1e-12)
        assert after == generate(model, [[rank], [3, 2]], **options)


class Letters:
    """Each id is a letter."""

    eos_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def stream(self, skip_special: bool = False) -> "Letters":
        return self

    def push(self, index: int) -> str:
        return chr(ord("a") + index)

    def finish(self) -> str:
        return ""


def test_streams_beside_calls_without_prompts_and_streams_that_are_closed(alone: Model) -> None:
    options: Any = {"tokenizer": Letters(), "sampling": Sampling(temperature=1.0), "max_new_tokens": 12}
    free = generate(alone, "ab", **options)[0].text
    assert free is not None
    stop = free[4:6]

    def run(rank: int, speculate: bool) -> list[Any]:
        model = cf.build(spec(2), seed=3)
        if rank == 1:
            idle = generate(model, [], speculate=speculate)
            return [idle, *take(stream(model, "cd", speculate=speculate, **options))]
        pieces = list(stream(model, "ab", stop=[stop], speculate=speculate, **options))
        found = generate(model, "efg", speculate=speculate, **options)
        return ["".join(piece.text for piece in pieces), found[0].text]

    def take(pieces: Generator[Any, None, None]) -> list[str]:
        """The first piece alone."""
        first = next(pieces).text
        pieces.close()
        return [first]

    for speculate in (False, True):
        (ab, efg), (none, cd) = on_ranks(2, run, speculate)
        texts = [generate(alone, text, speculate=speculate, **options)[0].text for text in ("ab", "efg", "cd")]
        assert ab == str(texts[0])[: str(texts[0]).index(stop)]
        assert (efg, none, cd) == (texts[1], [], str(texts[2])[0])


def lines(call: Callable[[int, Model], Any], size: int = 2, **changes: Any) -> list[tuple[str, ...]]:
    """What each process ends with; all of them, and the model serves on."""

    def run(rank: int) -> tuple[str, ...]:
        model = cf.build(spec(1, **changes), seed=3)
        with pytest.raises(ComposeError) as caught:
            call(rank, model)
        assert [len(row.ids) for row in generate(model, [[1, 2]], max_new_tokens=3)] == [3]
        return caught.value.lines

    return on_ranks(size, run, timeout=30)


def test_a_prompt_or_option_that_one_process_can_not_serve_ends_all_with_its_lines() -> None:
    bad: list[Any] = [[[1], [VOCAB], []], [[1]]]
    told = (
        f"process 0: prompt 1: token {VOCAB} at position 0: must be an id from 0 to {VOCAB - 1}",
        "process 0: prompt 2: is empty: it has no tokens",
    )
    assert lines(lambda rank, model: generate(model, bad[rank])) == [told] * 2
    assert lines(lambda rank, model: stream(model, bad[rank])) == [(told[0], told[1])] * 2
    short = ("max_new_tokens = 0: must be an integer >= 1",)
    assert lines(lambda rank, model: generate(model, [1], max_new_tokens=0)) == [short] * 2
    one = ("process 1: stream: takes one prompt, found 0",)
    assert lines(lambda rank, model: stream(model, [[1]] if rank == 0 else [])) == [one] * 2


def test_no_prompt_anywhere_and_drafts_in_one_process_alone() -> None:
    nothing = ("there is no prompt, in any process",)
    assert lines(lambda rank, model: generate(model, [])) == [nothing] * 2
    some = ("speculate: is set in some processes alone; all that share a model draft, or none does",)
    assert lines(lambda rank, model: generate(model, [1], speculate=rank == 1)) == [some] * 2


def test_logits_that_are_not_finite_in_one_process_end_all() -> None:
    def broken(rank: int, model: Model, speculate: bool) -> None:
        def damage(_: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
            return logits * torch.nan if len(seen) > 3 else logits

        seen: list[int] = []
        hook = model.head.register_forward_hook(damage) if rank == 1 else None
        count = model.register_forward_hook(lambda *_: seen.append(0))
        try:
            generate(model, [[1, 2], [3]], max_new_tokens=20, speculate=speculate)
        finally:
            count.remove()
            if hook is not None:
                hook.remove()

    (plain,) = lines(lambda rank, model: broken(rank, model, False))[0]
    assert plain.startswith("process 1: prompt 0, new token 4: the logits are not finite (nan)")
    first, second = lines(lambda rank, model: broken(rank, model, True))
    assert first == second
    assert "process 1: prompt 0, draft of new token" in first[0]


def test_a_tokenizer_that_raises_ends_the_others_in_one_line() -> None:
    class Broken(Letters):
        def push(self, index: int) -> str:
            raise KeyError("no such\npiece")

    def run(rank: int) -> str:
        model = cf.build(spec(2), seed=3)
        with pytest.raises((KeyError, InputError)) as caught:
            generate(model, [[1]], tokenizer=Broken() if rank == 0 else Letters(), max_new_tokens=4)
        return f"{caught.type.__name__}: {caught.value}"

    told = "InputError: process 0: KeyError: 'no such\\npiece'"
    assert on_ranks(2, run) == ["KeyError: 'no such\\npiece'", told]


def test_processes_that_each_hold_the_whole_model_generate_without_each_other(alone: Model) -> None:
    def run(rank: int) -> list[Generation]:
        model = cf.build(spec(1, shard=False), seed=3)
        return generate(model, [[1, 2]], max_new_tokens=5) if rank == 0 else generate(model, [])

    assert on_ranks(2, run) == [generate(alone, [[1, 2]], max_new_tokens=5), []]


@pytest.mark.parametrize("policy", [{"kind": "fp8-block"}, {"kind": "fp8-block", "weights": "float8_e4m3fn"}])
def test_under_fp8_too_also_where_weights_are_codes(policy: dict[str, str]) -> None:
    model = cf.build(spec(precision=policy), seed=3)
    prompts = [[1, 2, 3], [4]]
    options: Any = {"max_new_tokens": 6, "speculate": True}

    def run(rank: int) -> list[tuple[int, ...]]:
        spread = cf.build(spec(2, precision=policy), seed=3)
        return [row.ids for row in generate(spread, [prompts[rank]], **options)]

    assert on_ranks(2, run) == [[row.ids for row in generate(model, [one], **options)] for one in prompts]


torch.set_num_threads(1)
