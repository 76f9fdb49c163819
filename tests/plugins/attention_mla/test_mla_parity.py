"""mla against DeepSeek-V3's and V2's attention in transformers, same weights, positions past YaRN's original."""

from importlib import import_module

import pytest
import torch
from torch import nn

# Transformers' V2 pairs features of one stride, so its widths are even.
SIZES = {
    "num_attention_heads": 3,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
}
YARN = {"factor": 40.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
# V3's, V2's, and two whose table factor is not 1: by unequal strengths, and without any.
STRENGTHS = {
    "v3": {"mscale": 1.0, "mscale_all_dim": 1.0},
    "v2": {"mscale": 0.707, "mscale_all_dim": 0.707},
    "unequal": {"mscale": 1.0, "mscale_all_dim": 0.5},
    "none": {},
}
NAMES = {
    "q_proj": "q",
    "q_a_proj": "q_a",
    "q_a_layernorm": "q_a_norm",
    "q_b_proj": "q_b",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_a_layernorm": "kv_a_norm",
    "kv_b_proj": "kv_b",
    "o_proj": "o",
}


def theirs(lab, family, rope, rank, bias, dtype):
    """Their attention and their rotary tables; what they round to fp32 computes in `dtype`."""
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    title = "DeepseekV3" if family == "deepseek_v3" else "DeepseekV2"
    config = getattr(import_module(f"transformers.models.{family}"), f"{title}Config")(
        hidden_size=lab.hidden,
        q_lora_rank=rank,
        attention_bias=bias,
        num_key_value_heads=3,
        num_hidden_layers=1,
        max_position_embeddings=640,
        rope_parameters=rope,
        **SIZES,
    )
    config._attn_implementation = "sdpa"
    attention = getattr(module, f"{title}Attention")(config, 0).to(dtype)
    if dtype == torch.float64:
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if getattr(attention, name) is not None:
                setattr(attention, name, nn.RMSNorm(getattr(attention, name).weight.shape, 1e-6, dtype=dtype))
    return attention, getattr(module, f"{title}RotaryEmbedding")(config)


def both(lab, family, strengths, rank, bias, dtype):
    """Ours and theirs with the same weights."""
    yarn = {**YARN, **strengths}
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, **yarn}
    attention, rotary = theirs(lab, family, rope, rank, bias, getattr(torch, dtype))
    mixer = {name: value for name, value in SIZES.items() if name != "num_attention_heads"}
    model = lab.model(
        mixer={**mixer, "num_heads": 3, "q_lora_rank": rank, "attention_bias": bias},
        position={"kind": "yarn", "layout": "interleaved", **yarn},
        norm={"kind": "rmsnorm", "eps": 1e-6},
        precision={"kind": "full", "dtype": dtype},
    )
    ours = dict(model.layers[0].mixer.named_parameters())
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.copy_(ours.pop(translated(name)))
    assert not ours
    return model, attention, rotary


def translated(name):
    path, _, leaf = name.partition(".")
    return f"{NAMES[path]}.{leaf}"


def compare(lab, model, attention, rotary, x, bound, positions=None, valid=None):
    """Outputs and all gradients of the real tokens, each within `bound` of the largest."""
    rows, tokens, _ = x.shape
    if positions is None:
        positions = torch.arange(tokens).expand(rows, tokens)
    real = torch.ones(rows, tokens, dtype=torch.bool) if valid is None else valid
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & real[:, None]
    mask = mask | torch.eye(tokens, dtype=torch.bool)
    cotangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) * real[..., None]

    def run(x):
        tables = rotary(x, positions)
        return attention(x, position_embeddings=tables, attention_mask=mask[:, None])[0]

    wanted = lab.gradients(attention, run, x, cotangent)
    wanted = {translated(name) if "." in name else name: each for name, each in wanted.items()}
    batch = {"positions": positions, "valid": valid}
    found = lab.gradients(model, lambda x: lab.mix(model, x, **batch), x, cotangent)
    found = {name.removeprefix("layers.0.mixer."): each for name, each in found.items()}
    for each in (found, wanted):
        each["output"] = each["output"] * real[..., None]
    assert found.keys() == wanted.keys()
    assert (found["output"] - wanted["output"]).abs().max() <= bound * wanted["output"].abs().max()
    scale = max(each.abs().max() for each in wanted.values())
    for name in wanted:
        assert (found[name] - wanted[name]).abs().max() <= bound * scale, name


@pytest.mark.parametrize("strengths", STRENGTHS)
@pytest.mark.parametrize("rank", [9, None])
def test_equals_deepseek_v3_in_float64_with_every_gradient(lab, strengths, rank):
    pair = both(lab, "deepseek_v3", STRENGTHS[strengths], rank, True, "float64")
    compare(lab, *pair, lab.stream(2, 40), 1e-12)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
@pytest.mark.parametrize("rank", [9, None])
def test_equals_released_families_in_float32_far_past_the_original_length(lab, family, rank):
    strengths = STRENGTHS["v3" if family == "deepseek_v3" else "v2"]
    pair = both(lab, family, strengths, rank, False, "float32")
    positions = torch.stack([torch.arange(40), torch.arange(600, 640)])
    compare(lab, *pair, lab.stream(2, 40, dtype=torch.float32), 3e-6, positions)


def test_equals_deepseek_v3_under_left_padding(lab):
    pair = both(lab, "deepseek_v3", STRENGTHS["v3"], 9, True, "float64")
    valid = torch.arange(20) >= torch.tensor([[0], [7]])
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    compare(lab, *pair, lab.stream(2, 20), 1e-12, positions, valid)


def test_a_position_that_says_nothing_of_scores_leaves_them(lab):
    """And YaRN without `mscale_all_dim`, or with a factor of 1, says 1."""
    width = (5 + 4) ** -0.5
    for position in (
        {"kind": "rope"},
        {"kind": "none"},
        {"kind": "yarn", **YARN},
        {"kind": "yarn", **YARN, "mscale_all_dim": 0.0},
        {"kind": "yarn", **YARN, **STRENGTHS["v3"], "factor": 1.0},
    ):
        assert lab.model(position=position).layers[0].mixer.scale == pytest.approx(width, rel=1e-15)
    sharpened = lab.model(position={"kind": "yarn", **YARN, **STRENGTHS["v3"]}).layers[0].mixer.scale
    # DeepSeek-V3's released code: 1.3689 for a factor of 40.
    assert sharpened / width == pytest.approx(1.36888794541139**2, rel=1e-12)
