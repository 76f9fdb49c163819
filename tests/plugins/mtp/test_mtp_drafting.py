"""Drafting: whatever was drafted, taken and forgotten, each module says what it says in a full forward."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from composeformer.assemble import build
from composeformer.decoder import Model
from composeformer.spec import Spec

ROWS, TOKENS = 3, 14


def predicting(mixer: dict[str, object]) -> Model:
    spec = {
        "model": {"vocab_size": 29, "hidden_size": 16, "max_position_embeddings": 64, "init_std": 0.3},
        "norm": {"kind": "rmsnorm"},
        "position": {"kind": "rope"},
        "mixer": mixer,
        "ffn": {"kind": "swiglu", "intermediate_size": 24},
        "layers": [{}],
        "predictor": {"kind": "mtp", "depth": 3},
    }
    return build(Spec.from_dict(spec), dtype="float64", seed=6).eval()


LATENT = {
    "num_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}
MODELS = [
    predicting({"kind": "gqa", "num_heads": 2}),
    predicting({"kind": "gqa", "num_heads": 2, "window": 3}),
    predicting({"kind": "mla", **LATENT}),
]


bits = st.integers(0, 31)
drawn = st.tuples(st.integers(1, 5), st.tuples(bits, bits, bits), st.integers(0, 7))


def calls(found: list[tuple[int, tuple[int, ...], int]]) -> list[tuple[list[list[bool]], list[bool]]]:
    """Which columns of each call are real in each row, and which rows' drafts are right."""
    left = [TOKENS - 1] * ROWS
    made = []
    for width, masks, right in found:
        rows = []
        for row, mask in enumerate(masks):
            real = [bool(mask >> column & 1) for column in range(width)]
            while sum(real) > left[row]:
                real[real.index(True)] = False
            left[row] -= sum(real)
            rows.append(real)
        if any(map(any, rows)):
            made.append((rows, [bool(right >> row & 1) for row in range(ROWS)]))
    return made


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(range(len(MODELS))), st.lists(drawn, min_size=1, max_size=8).map(calls))
def test_modules_say_what_they_say_in_a_full_forward(
    which: int, made: list[tuple[list[list[bool]], list[bool]]]
) -> None:
    model = MODELS[which]
    ids = torch.randint(0, 29, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(ids, predict=True)
        drafting = model.predictor.new_cache(ROWS, 64)
        place = [0] * ROWS
        for columns, right in made:
            real = torch.tensor(columns)
            hidden = torch.full((*real.shape, 16), 7.0, dtype=torch.float64)
            following = torch.zeros(real.shape, dtype=torch.int64)
            for row in range(ROWS):
                for column in real[row].nonzero()[:, 0].tolist():
                    hidden[row, column] = full.hidden[row, place[row]]
                    following[row, column] = ids[row, place[row] + 1]
                    place[row] += 1
            said: list[Tensor] = []

            def choose(
                k: int, logits: Tensor, right: list[bool] = right, said: list[Tensor] = said
            ) -> Tensor:
                said.append(logits)
                chosen = (logits.argmax(-1) + 1) % 29
                for row in range(ROWS):
                    if right[row] and place[row] + k + 1 < TOKENS:
                        chosen[row] = ids[row, place[row] + k + 1]
                return chosen

            valid = None if bool(real.all()) else real
            drafts = model.predictor.draft(hidden, following, valid, drafting, model.rotary, choose)
            assert drafts.shape == (ROWS, 3)
            for row in range(ROWS):
                if not any(columns[row]):
                    continue
                for k, prediction in enumerate(full.predictions[: 3 if right[row] else 1]):
                    if place[row] + k < TOKENS - 1:
                        wanted = prediction.logits[row, place[row] - 1]
                        torch.testing.assert_close(said[k][row], wanted, rtol=1e-11, atol=1e-12)


def test_caches_hold_what_the_layer_s_mixers_cache_and_no_more() -> None:
    model = MODELS[2]
    drafting = model.predictor.new_cache(2, 10)
    assert drafting.num_bytes == 2 * (8 + 4) * 8 * (10 + 11 + 12)
