"""Rotary positions: transformers' tables and rotations to the bit; what they are is in the laws of positions."""

import pytest
import torch

from composeformer.errors import SpecError
from composeformer.tensors import Rotary

LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 40.0, "original_max_position_embeddings": 4096}
# kind, theta, fields; transformers has the same names for the fields
KINDS = {
    "rope": ("rope", 10000.0, {}),
    "rope-llama3": ("rope", 500000.0, {}),
    "linear": ("linear", 10000.0, {"factor": 4.0}),
    "llama3": ("llama3", 500000.0, LLAMA31),
    "llama3-other": (
        "llama3",
        10000.0,
        LLAMA31 | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
    ),
    "yarn": ("yarn", 10000.0, YARN),
    "yarn-deepseek": ("yarn", 10000.0, YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
    "yarn-mscale": ("yarn", 10000.0, YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}),
    "yarn-one-mscale": ("yarn", 10000.0, YARN | {"mscale": 0.707}),
    "yarn-stated": (
        "yarn",
        1000000.0,
        YARN | {"attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "yarn-untruncated": ("yarn", 150000.0, YARN | {"factor": 32.0, "truncate": False}),
    "yarn-short": ("yarn", 10000.0, YARN | {"original_max_position_embeddings": 8, "beta_slow": 1.0}),
    "yarn-of-one": ("yarn", 10000.0, YARN | {"factor": 1.0}),
}
LONG = torch.tensor([[0, 1, 2, 63, 4095, 4096, 8191, 8192, 131071, 163839]])

kinds = pytest.mark.parametrize("name", KINDS)


def position(lab, width, name="rope", dtype="float32", **fields):
    kind, theta, values = KINDS[name]
    table = {"kind": kind, "theta": theta, **values, **fields}
    mixer = {"kind": "gqa", "num_heads": 1, "head_dim": width}
    model = lab.model(position=table, mixer=mixer, precision={"kind": "full", "dtype": dtype})
    return model.layers[0].mixer.position


def theirs(name, width):
    """transformers' rotary module."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind, theta, values = KINDS[name]
    parameters = {"rope_type": "default" if kind == "rope" else kind, "rope_theta": theta, **values}
    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=1,
        head_dim=width,
        max_position_embeddings=int(
            values.get("factor", 1) * values.get("original_max_position_embeddings", 4096)
        ),
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)


@kinds
@pytest.mark.parametrize("width", [2, 64, 128])
def test_tables_equal_transformers_to_the_bit(lab, name, width):
    cos, sin = theirs(name, width)(torch.zeros(1), LONG)
    ours = position(lab, width, name)(LONG)
    assert torch.equal(torch.cat([ours.cos, ours.cos], -1), cos)
    assert torch.equal(torch.cat([ours.sin, ours.sin], -1), sin)


@kinds
def test_rotation_equals_transformers(lab, name):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    module = position(lab, 64, name)
    q, k = torch.randn(2, 10, 4, 64), torch.randn(2, 10, 2, 64)
    wanted = apply_rotary_pos_emb(q, k, *theirs(name, 64)(q, LONG), unsqueeze_dim=2)
    table = module(LONG)
    for found, expected in zip((module.rotate(q, table), module.rotate(k, table)), wanted, strict=True):
        assert torch.equal(found, expected)


def test_none_leaves_features_alone(lab, close):
    model = lab.model(position={"kind": "none"}, mixer={"kind": "gqa", "num_heads": 1, "head_dim": 5})
    module, x = model.layers[0].mixer.position, torch.randn(2, 3, 1, 5)
    assert module(torch.zeros(2, 3, dtype=torch.int64)).cos.shape == (2, 3, 0)
    assert module.rotate(x, Rotary(x[..., :0], x[..., :0])) is x
    y = lab.stream(1, 6)
    moved = lab.mix(model, y, positions=torch.arange(6)[None] * 3 + 5)
    close(moved, lab.mix(model, y))


def test_positions_change_what_rope_attends_to(lab):
    """Where `none` attends to the same."""
    model, x = lab.model(), lab.stream(1, 6)
    assert (lab.mix(model, x, positions=torch.arange(6)[None] * 3) - lab.mix(model, x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("table", "width", "line"),
    [
        ({"kind": "rope"}, 5, "must give an even rotary width, not 5 (of 5 features per head)"),
        ({"kind": "rope", "fraction": 0.4}, 8, "fraction = 0.4: must give an even rotary width, not 3"),
        ({"kind": "rope", "fraction": 0.1}, 8, "must give an even rotary width, not 0"),
        ({"kind": "rope", "fraction": 1.5}, 8, "position.fraction = 1.5: must be <= 1"),
        ({"kind": "rope", "layout": "halfsplit"}, 8, "half-split, interleaved; did you mean 'half-split'?"),
        (
            {"kind": "yarn", "factor": 0.5, "original_max_position_embeddings": 8},
            8,
            "position.factor = 0.5: must be >= 1",
        ),
        (
            {"kind": "yarn", **YARN, "beta_fast": 0.5},
            8,
            "position.beta_fast = 0.5: must be >= beta_slow (1.0)",
        ),
        (
            {"kind": "llama3", **LLAMA31, "low_freq_factor": 4.0},
            8,
            "high_freq_factor = 4.0: must be > low_freq_factor",
        ),
        ({"kind": "llama3", "factor": 8.0}, 8, "position.original_max_position_embeddings: is required"),
    ],
)
def test_impossible_rotations_are_refused(lab, table, width, line):
    with pytest.raises(SpecError) as caught:
        lab.spec(position=table, mixer={"kind": "gqa", "num_heads": 1, "head_dim": width})
    assert len(caught.value.problems) == 1
    assert line in str(caught.value)


def test_layers_of_one_rope_share_one_table(lab):
    model = lab.model(layers=[{"repeat": 3}])
    assert len({id(layer.mixer.position) for layer in model.layers}) == 1
    assert list(model.batch(torch.zeros(1, 4, dtype=torch.int64)).tables) == [
        model.layers[0].mixer.position.key
    ]
