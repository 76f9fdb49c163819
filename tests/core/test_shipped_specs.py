"""Shipped specs: what is built from them, three steps of training when scaled down, and where they come from."""

from typing import Any

import pytest
import torch

from composeformer.assemble import build
from composeformer.costs import cost
from composeformer.dialects import expressing
from composeformer.spec import Spec, shipped
from composeformer.spec.scanner import dotted
from composeformer.spec.values import leaves
from composeformer.tensors import DTYPES
from composeformer.train import TokenBatch, train_step, trainer

SMALL: dict[str, Any] = {
    "model.vocab_size": 128,
    "model.hidden_size": 32,
    "model.max_position_embeddings": 64,
    "train.learning_rate": 1e-2,
    "parallel.expert": 1,
    "parallel.pipeline": 1,
}
# Sizes by kind; what a spec leaves to its default stays there.
SIZES: dict[str, dict[str, int]] = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "mla": {
        "num_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "swiglu": {"intermediate_size": 48},
    "moe": {"num_experts": 16, "intermediate_size": 16},
}


def scaled(spec: Spec) -> Spec:
    """Every part and every choice of a spec, in miniature: sixteen experts at most, two layers of a sort."""
    data, changes = spec.to_dict(), dict(SMALL)
    for slot in ("mixer", "ffn"):
        for name, table in data[slot].items():
            sizes = SIZES[table["kind"]]
            changes |= {f"{slot}.{name}.{f}": min(n, table[f]) for f, n in sizes.items() if f in table}
    for index, entry in enumerate(data["layers"]):
        changes[f"layers.{index}.repeat"] = min(2, entry.get("repeat", 1))
    return spec.with_(changes)


def batches(count: int, vocab: int, rows: int = 2, length: int = 33) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(0)
    return [TokenBatch(torch.randint(vocab, (rows, length), generator=generator)) for _ in range(count)]


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
        stored = weight.dtype or policy.format(role, weight, linear is None or linear.sensitive).storage
        tensor: Any = built[tensor_name]
        assert (tuple(tensor.shape), tensor.dtype) == (weight.shape, DTYPES[stored])
        assert tensor.requires_grad == weight.trains
    counts = cost(found)
    assert sum(p.numel() for p in model.parameters()) == counts.total + counts.predictor
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", shipped())
def test_scaled_down_it_trains_three_steps(name: str) -> None:
    model = build(scaled(Spec.load(name)))
    objective, optimizer = trainer(model)
    (batch,) = batches(1, 128)
    losses = []
    for step in range(3):
        result = train_step(model, [batch], objective, optimizer, step=step, clip_norm=1.0)
        assert result.skipped is None
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        losses.append(result.loss)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", shipped())
def test_scaled_down_it_keeps_its_choices(name: str) -> None:
    found = Spec.load(name)
    small = scaled(found)
    assert {node.part.kind for node in small.plan.nodes()} == {node.part.kind for node in found.plan.nodes()}
    before, after = dict(leaves(found.to_dict())), dict(leaves(small.to_dict()))
    changed = {path[-1] for path, value in after.items() if before.get(path) != value}
    sizes = {field for table in SIZES.values() for field in table}
    assert changed <= {key.rpartition(".")[2] for key in SMALL} | sizes | {"repeat"}


@pytest.mark.parametrize("name", shipped())
def test_it_says_where_its_values_come_from(name: str) -> None:
    data = Spec.load(name).to_dict()
    assert data["name"] == name
    assert data["format"] == 1
    assert data["source"]
    assert data["description"].endswith(".")


@pytest.mark.parametrize("name", shipped())
def test_transformers_has_a_config_for_it(name: str) -> None:
    """Which says the same, so that what is trained from it can be exported."""
    found = Spec.load(name)
    dialect, config = expressing(found)
    assert Spec.from_dict(dialect.to_spec(config)).fingerprint == found.fingerprint
    assert config["model_type"] == dialect.model_type


# The tiny ones.


def test_tiny_deepseek_v3_has_every_part_of_its_namesake() -> None:
    tiny, big = Spec.load("tiny-deepseek-v3"), Spec.load("deepseek-v3")
    paths = [{dotted(path) for path, _ in leaves(spec.to_dict())} for spec in (tiny, big)]
    # How a run of the big one is formatted and spread is no part of it; the tiny one runs anywhere, in fp32.
    run = {"precision.kind", "comm.kind", "comm.ranks_per_node"}
    run |= {path for path in paths[1] if path.startswith(("cost.", "parallel.", "train."))}
    assert paths[0] ^ paths[1] == {"model.init_std", "layers.0.repeat", *run}
    assert {(n.slot, n.part.kind) for n in tiny.plan.nodes()} == {
        (n.slot, n.part.kind) for n in big.plan.nodes()
    }
    one, other = (spec.to_dict() for spec in (tiny, big))
    for table in ("norm", "predictor"):
        assert one[table] == other[table]
    for name in ("layout", "theta", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        assert one["position"]["rope"][name] == other["position"]["rope"][name]
    router, experts = one["ffn"]["experts"]["router"], one["ffn"]["experts"]
    assert 1 < router["top_k_groups"] < router["num_groups"] < experts["num_experts"]
    assert 1 < router["top_k"] < experts["num_experts"]
    rope = one["position"]["rope"]
    assert (
        one["model"]["max_position_embeddings"] == rope["factor"] * rope["original_max_position_embeddings"]
    )


@pytest.mark.parametrize("name", [name for name in shipped() if "experts" in Spec.load(name).named["ffn"]])
def test_experts_are_multiplied_together(name: str) -> None:
    """Every size in the zoo is one that grouped products take."""
    model = build(name, device="meta")
    chosen = {
        phase: choice
        for node in model.spec.plan.nodes()
        if node.part.kind == "moe"
        for phase, choice in model.choices[node.path].items()
    }
    assert set(chosen.values()) == {"grouped"}


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("tiny-")])
def test_the_tiny_ones_train_as_they_are(name: str) -> None:
    """Losses fall on data not seen before; what is wanted beside the labels' loss is there."""
    model = build(Spec.load(name).with_({"train.learning_rate": 3e-3}))
    objective, optimizer = trainer(model)
    # Bytes that follow from the one before, so that there is something to learn.
    steps = 24
    start = torch.randint(256, (steps, 4, 1), generator=torch.Generator().manual_seed(0))
    ids = (start + 7 * torch.arange(33)) % 256
    results = [
        train_step(model, [TokenBatch(ids[step])], objective, optimizer, step=step, clip_norm=1.0)
        for step in range(steps)
    ]
    assert results[-1].loss < 0.9 * results[0].loss
    sides = {path.rpartition(".")[2] for path in results[-1].losses}
    wanted = {"tiny-llama": set(), "tiny-moe": {"balance", "z"}, "tiny-deepseek-v3": {"balance", "depth_1"}}
    assert sides == wanted[name]
    if name == "tiny-deepseek-v3":
        moved = [b for path, b in model.state_dict().items() if path.endswith("router.bias")]
        assert len(moved) == 3
        assert all(float(bias.abs().max()) > 0 for bias in moved)
