"""Shipped specs: their exact totals, what is built from them, and three steps of training when scaled down."""

from typing import Any

import pytest
import torch

from composeformer.assemble import build
from composeformer.costs import cost
from composeformer.spec import Spec, shipped
from composeformer.tensors import DTYPES
from composeformer.train import TokenBatch, train_step, trainer

# As released, or computed from the released configuration: all parameters; active with both embeddings, without
# the input's, without both; cache bytes per token at two bytes; forward FLOPs per token of 4096, causal.
# Sources: Hugging Face parameter counts; arXiv 2407.21783 table 3 for llama-3.1-405b.
FACTS = {
    "smollm2-135m": (134_515_008, 134_515_008, 134_515_008, 106_203_456, 23_040, 1_231_552_512 / 3),
    "llama-3.1-8b": (8_030_261_248, 8_030_261_248, 7_504_924_672, 6_979_588_096, 131_072, 48_249_176_064 / 3),
    "llama-2-7b": (6_738_415_616, 6_738_415_616, 6_607_343_616, 6_476_271_616, 524_288, 42_863_689_728 / 3),
    "qwen2.5-72b": (
        72_706_203_648,
        72_706_203_648,
        71_460_495_360,
        70_214_787_072,
        327_680,
        444_856_270_848 / 3,
    ),
    "llama-3.1-405b": (
        405_853_388_800,
        405_853_388_800,
        405_853_388_800 - 128256 * 16384,
        405_853_388_800 - 2 * 128256 * 16384,
        126 * 2 * 8 * 128 * 2,
        2 * (126 * (2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248) + 128256 * 16384)
        + 126 * 4 * 16384 * 4096 / 2,
    ),
}
SMALL = {"model.vocab_size": 128, "model.hidden_size": 32, "model.max_position_embeddings": 64}


@pytest.mark.parametrize("name", FACTS)
def test_totals_are_exact(name: str) -> None:
    counts = cost(name)
    active = counts.active
    assert FACTS[name] == (
        counts.total,
        active.with_embeddings,
        active.without_input_embedding,
        active.without_embeddings,
        counts.cache_bytes_per_token,
        counts.flops_per_token.forward,
    )


def test_every_model_that_is_not_tiny_has_its_facts() -> None:
    assert set(FACTS) == {name for name in shipped() if not name.startswith("tiny-")}


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("precision", [{}, {"kind": "bf16"}])
def test_what_is_declared_is_built(name: str, precision: dict[str, str]) -> None:
    """Names, shapes, dtypes and counts, on the meta device."""
    found = Spec.load(name)
    found = found.with_(precision=precision) if precision else found
    model = build(found, device="meta")
    plan, policy = found.plan, found.single("precision").config
    roles = {f"{role}.{part}": linear for role, linear in plan.linears.items() for part in ("weight", "bias")}
    built = model.state_dict(keep_vars=True)
    assert set(built) == {*plan.tensors, *plan.aliases}
    for tensor_name, weight in plan.tensors.items():
        linear = roles.get(tensor_name)
        role = tensor_name if linear is None else tensor_name.rpartition(".")[0]
        stored = policy.format(role, weight, linear is None or linear.sensitive).storage
        tensor: Any = built[tensor_name]
        assert (tuple(tensor.shape), tensor.dtype) == (weight.shape, DTYPES[stored])
        assert tensor.requires_grad == weight.trains
    assert sum(p.numel() for p in model.parameters()) == cost(found).total
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", shipped())
def test_scaled_down_it_trains_three_steps(name: str) -> None:
    heads = {"mixer.attention.num_heads": 4, "mixer.attention.num_kv_heads": 2, "mixer.attention.head_dim": 8}
    small = SMALL | heads | {"ffn.dense.intermediate_size": 48, "layers.0.repeat": 2}
    model = build(Spec.load(name).with_(small | {"train.learning_rate": 1e-2}))
    objective, optimizer = trainer(model)
    batch = TokenBatch(torch.randint(128, (2, 33), generator=torch.Generator().manual_seed(0)))
    losses = []
    for step in range(3):
        result = train_step(model, [batch], objective, optimizer, step=step, clip_norm=1.0)
        assert result.skipped is None
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        losses.append(result.loss)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", shipped())
def test_it_says_where_its_values_come_from(name: str) -> None:
    data = Spec.load(name).to_dict()
    assert data["name"] == name
    assert data["format"] == 1
    assert data["source"]
    assert data["description"].endswith(".")
