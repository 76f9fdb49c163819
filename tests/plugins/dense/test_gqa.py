"""gqa against transformers' attention, its implementations against each other, and what it declares."""

from math import sqrt
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.contracts import Cache, Core, Facts, Normal
from composeformer.errors import SpecError
from composeformer.tensors import visible
from composeformer_dense.configs.attention import sdpa_needs

quick = settings(max_examples=15, deadline=None, derandomize=True)


def both(lab, seed=0, **fields):
    """The same weights under the two implementations."""
    names = ("sdpa", "reference")
    return [lab.model(seed, mixer={"kind": "gqa", "implementation": name, **fields}) for name in names]


@quick
@given(
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    window=st.none() | st.integers(1, 9),
    packed=st.booleans(),
    padded=st.booleans(),
    extras=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sdpa_equals_reference_with_every_gradient(
    lab, close, groups, kv_heads, window, packed, padded, extras, seed
):
    fields = {
        "num_heads": groups * kv_heads,
        "num_kv_heads": kv_heads,
        "head_dim": 4,
        "qkv_bias": extras,
        "o_bias": extras,
    }
    if extras:
        fields["qk_norm"] = "norm"
    if window is not None:
        fields["window"] = window
    batch = {}
    if packed:
        batch["documents"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2]])
    if padded:
        batch["valid"] = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])
    models = both(lab, seed, **fields)
    x = lab.stream(2, 7, seed)
    found, wanted = (lab.gradients(m, lambda x, m=m: lab.mix(m, x, **batch), x) for m in models)
    # Unlike the outputs, a gradient may be zero but for rounding: compare against the largest.
    scale = max(g.abs().max() for g in wanted.values())
    for name in wanted:
        assert (found[name] - wanted[name]).abs().max() <= 1e-12 * scale, name


def test_a_row_of_padding_alone_gives_zeros_and_no_gradient(lab):
    """It sees no key at all, where a softmax has nothing to divide by."""
    for model in both(lab, num_heads=2):
        valid = torch.tensor([[False] * 4, [False, False, True, True]])
        found = lab.gradients(model, lambda x, m=model, v=valid: lab.mix(m, x, valid=v), lab.stream(2, 4))
        assert all(torch.isfinite(each).all() for each in found.values())
        assert not found["output"][0].any()
        assert not found["input"][0].any()


@pytest.mark.parametrize("implementation", ["sdpa", "reference"])
def test_bfloat16_is_near_float32(lab, implementation):
    """Within the rounding of inputs, outputs and probabilities to eight bits."""
    mixer = {
        "kind": "gqa",
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "implementation": implementation,
    }
    narrow, wide = (
        lab.model(mixer=mixer, precision={"kind": "full", "dtype": d}) for d in ("bfloat16", "float32")
    )
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())
    x = lab.stream(2, 20, dtype=torch.bfloat16)
    found, wanted = lab.mix(narrow, x), lab.mix(wide, x.float())
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 2**-6 * wanted.abs().max()


def tables(model, tokens, dtype):
    """Tables as transformers lays them out."""
    cos, sin = model.layers[0].mixer.position(torch.arange(tokens)[None])
    return tuple(torch.cat([t, t], -1).to(dtype) for t in (cos, sin))


def test_equals_transformers_qwen3_attention(lab, close):
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    theirs_config = Qwen3Config(
        hidden_size=lab.hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        attention_bias=True,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
    )
    theirs_config._attn_implementation = "eager"
    theirs = Qwen3Attention(theirs_config, 0)
    single = {"kind": "full", "dtype": "float32"}
    mixer = {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": "norm"}
    mixer |= {"qkv_bias": True, "o_bias": True}
    model = lab.model(mixer=mixer, norm={"kind": "rmsnorm", "eps": 1e-5}, precision=single)
    ours = dict(model.layers[0].mixer.named_parameters())
    renamed = {name.replace("_proj", ""): p for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.items():
            renamed[name].copy_(parameter)
    x = lab.stream(2, 11, dtype=torch.float32)
    mask = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    wanted = lab.gradients(theirs, lambda x: theirs(x, tables(model, 11, x.dtype), mask)[0], x)
    found = lab.gradients(model, lambda x: lab.mix(model, x), x)
    strip = "layers.0.mixer."
    found = {n.removeprefix(strip): g for n, g in found.items()}
    wanted = {n.replace("_proj", ""): g for n, g in wanted.items()}
    scale = max(g.abs().max() for g in wanted.values())
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).abs().max() <= 3e-6 * scale, name


def eager(family):
    from importlib import import_module

    return import_module(f"transformers.models.{family}.modeling_{family}").eager_attention_forward


@pytest.mark.parametrize(
    ("family", "fields", "arguments"),
    [
        ("mistral", {"window": 3}, {}),
        ("gemma2", {"cap": 1.5}, {"softcap": 1.5}),
        ("gpt_oss", {"sinks": True, "window": 4}, {}),
    ],
)
def test_the_core_equals_transformers_eager_attention(lab, close, family, fields, arguments):
    model = lab.model(mixer={"kind": "gqa", "num_heads": 6, "num_kv_heads": 2, "head_dim": 8, **fields})
    mixer = model.layers[0].mixer
    q, k, v = (torch.randn(2, 9, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    positions = torch.arange(9)[None]
    seen = visible(positions, positions, None, None, fields.get("window"))
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[:, None]
    module = SimpleNamespace(num_key_value_groups=3, training=False, head_dim=8, sinks=mixer.sinks)
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    wanted, _ = eager(family)(module, *heads_first, mask, scaling=8**-0.5, **arguments)
    # transformers rounds the softmax to fp32 in some families.
    close(mixer.attend(q, k, v, seen), wanted, 1e-6)


def test_window_of_the_whole_context_is_no_window(lab):
    x = lab.stream(1, 8)
    wide = lab.model(mixer={"kind": "gqa", "num_heads": 2, "window": 8})
    none = lab.model(mixer={"kind": "gqa", "num_heads": 2})
    assert torch.equal(lab.mix(wide, x), lab.mix(none, x))


def test_a_window_of_one_sees_only_itself(lab, close):
    model = lab.model(mixer={"kind": "gqa", "num_heads": 2, "window": 1})
    mixer, x = model.layers[0].mixer, lab.stream(1, 8)
    close(lab.mix(model, x), mixer.o(mixer.v(x)))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "mixer.num_kv_heads = 3: must divide num_heads (4)"),
        ({"num_heads": 5}, "mixer.num_heads = 5: must divide hidden_size (12), or head_dim must be given"),
        ({"num_heads": 4}, "must give an even rotary width, not 3"),
        ({"num_heads": 2, "window": 0}, "mixer.window = 0: must be >= 1"),
        ({"num_heads": 2, "qk_norm": "rms"}, "mixer.qk_norm"),
    ],
)
def test_impossible_heads_are_refused_by_name(lab, fields, line):
    with pytest.raises(SpecError) as caught:
        lab.spec(mixer={"kind": "gqa", **fields})
    assert len(caught.value.problems) == 1
    assert line in str(caught.value)


def test_no_norm_is_taken_unless_asked_for(lab):
    """Though the spec has exactly one norm, an absent qk_norm means none."""
    assert lab.model(mixer={"kind": "gqa", "num_heads": 2}).layers[0].mixer.q_norm is None


def test_sdpa_is_chosen_unless_it_can_not_serve(lab):
    plain = lab.model(mixer={"kind": "gqa", "num_heads": 2})
    assert plain.choices["layers.0.mixer"] == dict.fromkeys(("train", "prefill", "decode"), "sdpa")
    for fields, reason in (({"sinks": True}, "sinks"), ({"cap": 30.0}, "soft cap")):
        model = lab.model(mixer={"kind": "gqa", "num_heads": 2, **fields})
        assert model.choices["layers.0.mixer"]["train"] == "reference"
        node = model.spec.plan.layers[0]["mixer"]
        facts = Facts(config=node.part.config, site=node.site, phase="train", device="cpu", dtype="float32")
        assert reason in (sdpa_needs(facts) or "")


def test_cost_counts_the_products_and_the_cache(lab):
    spec = lab.spec(mixer={"kind": "gqa", "num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "window": 7})
    node = spec.plan.layers[0]["mixer"]
    core, cache = node.part.config.cost(node.site, "decode")
    assert core == Core(name=core.name, per_key=4 * 6 * 4, window=7)
    assert cache == Cache(name=cache.name, per_token=2 * 2 * 4, window=7, shard=True)
    held = lab.model(mixer={"kind": "gqa", "num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "window": 7})
    assert held.layers[0].mixer.new_cache(3, 100).num_bytes == 3 * cache.elements(100) * 8


def test_output_projections_start_smaller_with_depth(lab):
    """The documented scheme: GPT-2's."""
    spec = lab.spec(layers=[{"repeat": 8}])
    layer = spec.plan.layers[5]
    std = spec.model.init_std
    for slot, inner, outer in (("mixer", "q", "o"), ("ffn", "up", "down")):
        assert layer[slot].linears[inner].init == Normal(std)
        assert layer[slot].linears[outer].init == Normal(std / sqrt(16))


def test_heads_that_follow_from_others_may_be_left_out(lab):
    """The same model, by its fingerprint; another head width is another."""
    short = lab.spec(mixer={"kind": "gqa", "num_heads": 2})
    full = lab.spec(mixer={"kind": "gqa", "num_heads": 2, "num_kv_heads": 2, "head_dim": 6})
    other = lab.spec(mixer={"kind": "gqa", "num_heads": 2, "num_kv_heads": 2, "head_dim": 4})
    assert short.fingerprint == full.fingerprint != other.fingerprint


def test_phases_may_be_served_by_different_implementations(lab, close):
    fields = {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "window": 3}
    phases = {"train": "sdpa", "prefill": "reference", "decode": "sdpa"}
    mixed, plain = (lab.model(mixer={**fields, "implementation": i}) for i in (phases, "reference"))
    x = lab.stream(2, 8)
    with torch.no_grad():
        for model in (mixed, plain):
            cache = model.layers[0].mixer.new_cache(2, 8)
            parts = [
                lab.mix(model, part, cache=cache, phase=phase)
                for part, phase in zip(
                    x.split([5, 1, 1, 1], 1), ("prefill", "decode", "decode", "decode"), strict=True
                )
            ]
            close(torch.cat(parts, 1), lab.mix(plain, x))
        close(lab.mix(mixed, x), lab.mix(plain, x))
    assert mixed.choices["layers.0.mixer"] == phases
