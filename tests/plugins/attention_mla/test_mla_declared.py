"""What mla declares on paper: tensors, shards, cost, refusals, and the choice of implementations."""

from math import sqrt

import pytest
import torch

import composeformer as cf
from composeformer.contracts import Cache, Core, Normal, Saved

PHASES = ("train", "prefill", "decode")
V3 = {
    "num_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def node(lab, mixer=None, **tables):
    return lab.spec(mixer=mixer or {}, **tables).plan.layers[0]["mixer"]


def test_the_layer_of_deepseek_v3_by_its_published_sizes(lab):
    found = node(lab, V3, model={"hidden_size": 7168})
    shapes = {name: (linear.outputs, linear.inputs) for name, linear in found.linears.items()}
    assert shapes == {
        "q_a": (1536, 7168),
        "q_b": (128 * 192, 1536),
        "kv_a": (576, 7168),
        "kv_b": (128 * 256, 512),
        "o": (7168, 128 * 128),
    }
    assert sum(weight.elements for each in found.walk() for _, weight in each.tensors()) == 187_107_328
    costs = {phase: tuple(found.part.config.cost(found.site, phase)) for phase in PHASES}
    # Training keeps tensors for its backward pass, besides.
    assert tuple(each for each in costs["train"] if not isinstance(each, Saved)) == costs["prefill"]
    assert costs["train"][0].per_key == 2 * 128 * (192 + 128)
    assert costs["decode"][0].per_key == 278_528
    assert costs["decode"][1].per_token == costs["train"][1].per_token == 576


def test_built_equals_declared_with_and_without_query_compression(lab):
    for mixer in (
        {},
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"attention_bias": True, "q_lora_rank": None},
    ):
        found = node(lab, mixer)
        declared = {name: weight.shape for each in found.walk() for name, weight in each.tensors()}
        built = lab.model(mixer=mixer).layers[0].mixer.state_dict()
        assert {f"layers.0.mixer.{name}": tuple(each.shape) for name, each in built.items()} == declared


def test_biases_stand_where_released_configs_have_them(lab):
    with_queries = node(lab, {"attention_bias": True}).linears
    assert [name for name, linear in with_queries.items() if linear.bias] == ["q_a", "kv_a", "o"]
    without = node(lab, {"attention_bias": True, "q_lora_rank": None}).linears
    assert [name for name, linear in without.items() if linear.bias] == ["kv_a", "o"]


def test_whole_heads_are_cut_and_latents_are_not(lab):
    facts = {name: (linear.shard, linear.unit) for name, linear in node(lab).linears.items()}
    assert facts == {
        "q_a": (None, 1),
        "q_b": ("out", 9),
        "kv_a": (None, 1),
        "kv_b": ("out", 8),
        "o": ("in", 3),
    }
    assert node(lab, {"q_lora_rank": None}).linears["q"].unit == 9


def test_latents_are_normalised_at_the_eps_of_the_spec(lab):
    model = lab.model(norm={"kind": "rmsnorm", "eps": 0.03})
    mixer = model.layers[0].mixer
    x = lab.stream(1, 1)
    with torch.no_grad():
        latent = mixer.kv_a(x)[..., : mixer.rank]
        cache = mixer.new_cache(1, 4)
        lab.mix(model, x, cache=cache)
    wanted = latent / (latent.pow(2).mean(-1, keepdim=True) + 0.03).sqrt() * mixer.kv_a_norm.weight
    assert (cache.tensors["latent"][:, 0] - wanted[:, 0]).abs().max() < 1e-12


@pytest.mark.parametrize("window", [None, 7])
def test_a_cache_holds_a_latent_and_a_rotary_key_per_token_and_no_more(lab, window):
    found = node(lab, {"window": window})
    core, cache = found.part.config.cost(found.site, "decode")
    assert core == Core(name=core.name, per_key=2 * 2 * (2 * 7 + 4), window=window)
    assert cache == Cache(name=cache.name, per_token=7 + 4, window=window)
    held = lab.model(mixer={"window": window}).layers[0].mixer.new_cache(3, 100)
    assert held.num_bytes == 3 * cache.elements(100) * 8


@pytest.mark.parametrize("mixer", [{}, {"q_lora_rank": None}, {"num_heads": 1, "v_head_dim": 11}])
def test_declared_products_are_those_pytorch_counts(lab, mixer):
    """In the convention of PyTorch's counter: a full mask. Decoding: a token against all that is cached."""
    from torch.utils.flop_counter import FlopCounterMode

    found = node(lab, mixer)
    linears = sum(linear.flops for linear in found.linears.values())
    core = {phase: next(iter(found.part.config.cost(found.site, phase))) for phase in PHASES}
    plain = lab.model(mixer={**mixer, "implementation": "reference"})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lab.mix(plain, lab.stream(2, 9))
    assert counter.get_total_flops() == 2 * 9 * (linears + core["train"].flops(9, causal=False))
    model = lab.model(mixer=mixer)
    cache = model.layers[0].mixer.new_cache(2, 9)
    with torch.no_grad():
        lab.mix(model, lab.stream(2, 8), cache=cache)
        with FlopCounterMode(display=False) as counter:
            lab.mix(model, lab.stream(2, 1), cache=cache)
    assert counter.get_total_flops() == 2 * (linears + core["decode"].flops(9, causal=False))


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({"mixer": {"kv_lora_rank": 0}}, "mixer.kv_lora_rank = 0: must be >= 1"),
        ({"mixer": {"q_lora_rank": 0}}, "mixer.q_lora_rank = 0: must be >= 1"),
        ({"mixer": {"num_heads": 0}}, "mixer.num_heads = 0: must be >= 1"),
        ({"mixer": {"v_head_dim": 0}}, "mixer.v_head_dim = 0: must be >= 1"),
        ({"mixer": {"window": 0}}, "mixer.window = 0: must be >= 1"),
        ({"mixer": {"qk_rope_head_dim": 5}}, "qk_rope_head_dim = 5: must be even"),
        ({"mixer": {"kv_lora_rank": None}}, "mixer.kv_lora_rank: is required"),
        ({"mixer": {"kv_lora_rnak": 7}}, "did you mean 'kv_lora_rank'"),
        ({"mixer": {"norm": "rms"}}, "mixer.norm"),
        (
            {"mixer": {"implementation": "expanded"}},
            "no such implementation for decode",
        ),
    ],
)
def test_what_is_impossible_is_refused_by_name_in_one_line(lab, tables, line):
    with pytest.raises(cf.ComposeError) as caught:
        cf.build(lab.spec(**tables), device="meta")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_auto_expands_in_training_and_prefill_and_absorbs_in_decoding(lab):
    chosen = lab.model().choices["layers.0.mixer"]
    assert chosen == {"train": "expanded", "prefill": "expanded", "decode": "absorbed"}


def test_output_projections_start_smaller_with_depth(lab):
    found = lab.spec(layers=[{"repeat": 8}]).plan.layers[5]["mixer"].linears
    assert found["kv_b"].init == found["q_b"].init == Normal(0.6)
    assert found["o"].init == Normal(0.6 / sqrt(16))


def test_a_change_of_function_changes_the_fingerprint_and_an_implementation_does_not(lab):
    plain = lab.spec().fingerprint
    assert lab.spec(mixer={"implementation": "reference"}).fingerprint == plain
    assert lab.spec(mixer={"window": 9}).fingerprint != plain
    assert lab.spec(mixer={"q_lora_rank": None}).fingerprint != plain
    assert lab.spec(mixer={"attention_bias": True}).fingerprint != plain
