"""Every mixer with every ffn, router, predictor, head and norm: builds, learns, saves, loads, generates, speculates.

The matrix is the product of its axes, and the axes have every kind that is registered.
"""

import sysconfig
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import composeformer as cf
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.generation import generate
from composeformer.plugins import current
from composeformer.spec import Spec
from composeformer.train import TokenBatch, train_step, trainer

LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MOE = {"kind": "moe", "num_experts": 4, "num_shared_experts": 1, "intermediate_size": 16}
MIXERS: dict[str, dict[str, Any]] = {
    "gqa": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2},
    "gqa-window": {"kind": "gqa", "num_heads": 4, "window": 5},
    "mla": {"kind": "mla", "num_heads": 4, "q_lora_rank": 12, **LATENT},
    "mla-window": {"kind": "mla", "num_heads": 4, "window": 5, **LATENT},
}
FFNS: dict[str, dict[str, Any]] = {
    "swiglu": {"kind": "swiglu", "intermediate_size": 48},
    "softmax": {**MOE, "router": {"kind": "softmax", "top_k": 2, "balance_alpha": 0.01, "z_alpha": 1e-3}},
    "sigmoid-bias": {**MOE, "router": {"kind": "sigmoid-bias", "top_k": 2, "num_groups": 2}},
}
PREDICTORS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "mtp-1": {"kind": "mtp", "depth": 1},
    "mtp-2": {"kind": "mtp", "depth": 2},
}
NORMS: dict[str, dict[str, Any]] = {"rmsnorm": {"kind": "rmsnorm"}, "layernorm": {"kind": "layernorm"}}
ENDS = {"tied": True, "untied": False}
CELLS = list(product(MIXERS, FFNS, PREDICTORS, ENDS, NORMS))
PROMPT = 11


def spec(mixer: str, ffn: str, predictor: str, ends: str, norm: str) -> Spec:
    data: dict[str, Any] = {
        "model": {
            "vocab_size": 128,
            "hidden_size": 32,
            "max_position_embeddings": 64,
            "tie_embeddings": ENDS[ends],
        },
        "norm": NORMS[norm],
        "position": {"kind": "rope"},
        "mixer": MIXERS[mixer],
        "ffn": FFNS[ffn],
        "layers": [{"repeat": 2}],
        "train": {"learning_rate": 0.01},
    }
    if PREDICTORS[predictor] is not None:
        data["predictor"] = PREDICTORS[predictor]
    return Spec.from_dict(data)


@cache
def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of real text to learn from, and others that are held out."""
    data = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes()
    rows = torch.tensor([min(byte, 127) for byte in data[: 48 * 64]]).view(-1, 48)
    return rows[:-8], rows[-8:]


def held_out_loss(model: Model) -> float:
    objective, _ = trainer(model)
    seen = TokenBatch(text()[1])
    with torch.no_grad():
        total, weight = objective(model(seen.ids, predict=False), seen.seen())
    return float(total / weight)


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_combination_works_from_spec_to_text(cell: tuple[str, ...], tmp_path: Path) -> None:
    model = cf.build(spec(*cell), seed=1)
    objective, optimizer = trainer(model)
    before = held_out_loss(model)
    rows = text()[0]
    for step in range(10):
        batch = TokenBatch(rows[step * 4 : step * 4 + 8])
        result = train_step(model, [batch], objective, optimizer, step=step, clip_norm=1.0)
        assert result.skipped is None
    assert held_out_loss(model) < before - 0.5

    cf.save(model, tmp_path / "model")
    loaded = cf.load(tmp_path / "model")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.state_dict().keys() == state.keys()

    prompts = [text()[1][0, :PROMPT].tolist(), text()[1][1, :4].tolist()]
    made = generate(loaded, prompts, max_new_tokens=12)
    for prompt, row in zip(prompts, made, strict=True):
        _assert_uncached(loaded, prompt, row.ids)
    if loaded.predictor is not None:
        drafted = generate(loaded, prompts, max_new_tokens=12, speculate=True)
        for prompt, row in zip(prompts, drafted, strict=True):
            _assert_uncached(loaded, prompt, row.ids)


def _assert_uncached(model: Model, prompt: list[int], made: tuple[int, ...]) -> None:
    """Each token made is the best of a full forward over all before it, or lies within rounding of it."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *made]]), predict=False).logits[0, len(prompt) - 1 : -1]
    lost = logits.amax(-1) - logits.gather(1, torch.tensor(made)[:, None])[:, 0]
    assert float(lost.max()) <= 2e-5 * float(logits.abs().max())


@pytest.mark.parametrize("slot", ["mixer", "ffn", "router", "norm", "predictor"])
def test_the_axes_have_every_kind_that_is_registered(slot: str) -> None:
    tables = {
        "mixer": list(MIXERS.values()),
        "ffn": list(FFNS.values()),
        "router": [table["router"] for table in FFNS.values() if "router" in table],
        "norm": list(NORMS.values()),
        "predictor": [table for table in PREDICTORS.values() if table is not None],
    }
    assert {table["kind"] for table in tables[slot]} == set(current().registry.kinds(slot))


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "more chosen experts than there are": ({"ffn.router.top_k": 5}, "top_k = 5: must be <= num_experts"),
    "groups of unequal sizes": ({"ffn.router.num_groups": 3}, "num_groups = 3: must divide num_experts"),
    "a rotary width that is odd": ({"mixer.qk_rope_head_dim": 3}, "even"),
    "a latent of nothing": ({"mixer.kv_lora_rank": 0}, "kv_lora_rank = 0: must be"),
    "a depth beyond the longest row": ({"model.max_position_embeddings": 2}, "depth = 2: must be <"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_combination_is_refused_with_the_reason(name: str) -> None:
    changes, reason = IMPOSSIBLE[name]
    possible = spec("mla", "sigmoid-bias", "mtp-2", "tied", "rmsnorm")
    with pytest.raises(SpecError) as refused:
        possible.with_(changes)
    assert len(refused.value.problems) == 1
    assert reason in str(refused.value)
