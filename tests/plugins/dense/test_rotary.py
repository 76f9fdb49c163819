"""Rotary positions: transformers' tables to the bit, the closed form after any cast, laws of rotation."""

from math import log, pi

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.errors import SpecError
from composeformer.tensors import Rotary

quick = settings(max_examples=5, deadline=None, derandomize=True)

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


def closed_form(kind, theta, width, values):
    """Frequencies in float64 from the papers' formulas, and the amplitude; written apart from the code."""
    base = [theta ** (-2 * i / width) for i in range(width // 2)]
    factor = values.get("factor", 1.0)
    original = values.get("original_max_position_embeddings", 0)
    if kind == "linear":
        return [f / factor for f in base], 1.0
    if kind == "llama3":
        low, high = values["low_freq_factor"], values["high_freq_factor"]
        mixed = []
        for f in base:
            share = min(max((original * f / (2 * pi) - low) / (high - low), 0.0), 1.0)
            mixed.append(f * (share + (1 - share) / factor))
        return mixed, 1.0
    if kind == "yarn":
        fast, slow = values.get("beta_fast", 32.0), values.get("beta_slow", 1.0)
        low, high = (width * log(original / (b * 2 * pi)) / (2 * log(theta)) for b in (fast, slow))
        if values.get("truncate", True):
            low, high = low // 1, -(-high // 1)
        low, high = max(low, 0), min(high, width - 1)
        ramp = [min(max((i - low) / ((high - low) or 0.001), 0.0), 1.0) for i in range(width // 2)]
        strength = [0.1 * values.get(m, 1.0) * log(factor) + 1 for m in ("mscale", "mscale_all_dim")]
        both = "mscale" in values and "mscale_all_dim" in values
        amplitude = values.get(
            "attention_factor", strength[0] / strength[1] if both else 0.1 * log(factor) + 1
        )
        return [f * (1 - r + r / factor) for f, r in zip(base, ramp, strict=True)], amplitude
    return base, 1.0


@kinds
def test_tables_are_the_papers_formulas(lab, name):
    """Within the rounding of one angle to fp32 at each position."""
    kind, theta, values = KINDS[name]
    frequencies, amplitude = closed_form(kind, theta, 64, values)
    angles = LONG[..., None].double() * torch.tensor(frequencies, dtype=torch.float64)
    found = position(lab, 64, name)(LONG)
    bound = 2e-6 + angles * 4e-7
    assert ((found.cos - angles.cos() * amplitude).abs() <= bound).all()
    assert ((found.sin - angles.sin() * amplitude).abs() <= bound).all()


@kinds
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_tables_stay_fp32_after_any_cast_and_after_a_meta_build(lab, name, dtype):
    from composeformer.assemble import build

    wanted = position(lab, 64, name)(LONG)
    module = position(lab, 64, name, dtype)
    for cast in (module, module.bfloat16(), module.half().to(torch.float64), module.to_empty(device="cpu")):
        found = cast(LONG)
        assert found.cos.dtype == torch.float32
        assert torch.equal(found.cos, wanted.cos)
        assert torch.equal(found.sin, wanted.sin)
    assert not list(module.buffers())
    kind, theta, values = KINDS[name]
    mixer = {"kind": "gqa", "num_heads": 1, "head_dim": 64}
    spec = lab.spec(position={"kind": kind, "theta": theta, **values}, mixer=mixer)
    meta = build(spec, device="meta").layers[0].mixer.position
    assert torch.equal(meta(LONG).sin, wanted.sin)


@kinds
@pytest.mark.parametrize("layout", ["half-split", "interleaved"])
@quick
@given(start=st.integers(0, 500), distance=st.integers(0, 500), shift=st.integers(0, 500))
def test_scores_depend_on_distance_alone(lab, name, layout, start, distance, shift):
    module = position(lab, 8, name, layout=layout)
    generator = torch.Generator().manual_seed(start)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def score(i, j):
        return (
            module.rotate(q, module(torch.tensor([[i]]))) * module.rotate(k, module(torch.tensor([[j]])))
        ).sum()

    here, there = score(start + distance, start), score(start + distance + shift, start + shift)
    # Angles are rounded to fp32: 1500 * 2^-24, twice, for features of norm about 3 and amplitudes below 1.6.
    assert (here - there).abs() <= 1e-3 * max(1.0, float(q.norm() * k.norm()))


@kinds
@pytest.mark.parametrize("layout", ["half-split", "interleaved"])
def test_inverse_undoes_rotation(lab, close, name, layout):
    module = position(lab, 12, name, layout=layout, fraction=0.7)
    x = torch.randn(1, 10, 3, 12, dtype=torch.float64)
    table = module(LONG)
    assert not torch.equal(module.rotate(x, table), x)
    close(module.rotate(module.rotate(x, table), table, inverse=True), x, 1e-6)


@kinds
def test_rotation_equals_transformers(lab, name):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    module = position(lab, 64, name)
    q, k = torch.randn(2, 10, 4, 64), torch.randn(2, 10, 2, 64)
    wanted = apply_rotary_pos_emb(q, k, *theirs(name, 64)(q, LONG), unsqueeze_dim=2)
    table = module(LONG)
    for found, expected in zip((module.rotate(q, table), module.rotate(k, table)), wanted, strict=True):
        assert torch.equal(found, expected)


def test_layouts_are_equal_after_a_permutation(lab):
    half, interleaved = (position(lab, 10, layout=layout) for layout in ("half-split", "interleaved"))
    order = torch.arange(10).view(2, 5).T.flatten()  # 0 5 1 6 2 7 ...
    x, table = torch.randn(2, 10, 3, 10), half(LONG)
    assert torch.equal(interleaved.rotate(x[..., order], table), half.rotate(x, table)[..., order])


@pytest.mark.parametrize("layout", ["half-split", "interleaved"])
def test_a_fraction_turns_the_first_features_only(lab, layout):
    part, whole = position(lab, 16, layout=layout, fraction=0.5), position(lab, 8, layout=layout)
    x = torch.randn(1, 10, 2, 16)
    y, table = part.rotate(x, part(LONG)), part(LONG)
    assert table.cos.shape == (1, 10, 4)
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert torch.equal(y[..., :8], whole.rotate(x[..., :8], table))


def test_a_rotation_is_rounded_once(lab):
    """In bfloat16 the result is the fp32 rotation rounded, for tables are never cast."""
    module, x = position(lab, 16), torch.randn(1, 10, 2, 16).bfloat16()
    found = module.rotate(x, module(LONG))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, module.rotate(x.float(), module(LONG)).bfloat16())


def test_a_factor_of_one_is_plain_rope(lab):
    plain, linear = position(lab, 32)(LONG), position(lab, 32, "linear", factor=1.0)(LONG)
    assert torch.equal(linear.cos, plain.cos)
    # YaRN's blend of two equal frequencies may round: one unit of fp32 at each angle.
    yarn = position(lab, 32, "yarn-of-one")(LONG)
    assert ((yarn.sin - plain.sin).abs() <= 1e-6 + 2**-23 * LONG[..., None]).all()


def test_none_leaves_features_alone(lab, close):
    model = lab.model(position={"kind": "none"}, mixer={"kind": "gqa", "num_heads": 1, "head_dim": 5})
    module, x = model.layers[0].mixer.position, torch.randn(2, 3, 1, 5)
    assert module(torch.zeros(2, 3, dtype=torch.int64)).cos.shape == (2, 3, 0)
    assert module.rotate(x, Rotary(x[..., :0], x[..., :0])) is x
    y = lab.stream(1, 6)
    moved = lab.mix(model, y, positions=torch.arange(6)[None] * 3 + 5)
    close(moved, lab.mix(model, y))


def test_positions_change_what_rope_attends_to(lab):
    """So that the law above is not true of any position part."""
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
