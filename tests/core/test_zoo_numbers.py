"""The zoo's numbers, exactly: parameters in every convention, predictors, buffers, caches, operations.

Sources: parameter totals of the released checkpoints; arXiv 2407.21783, table 3, for llama-3.1-405b; operations as
arXiv 2505.09343, table 2, counts them (of DeepSeek-V3 250 GFLOPs per token in training). The three active counts
are with both embeddings, without the input's, and without both.
"""

from math import ceil
from typing import Any

import attrs
import pytest

from composeformer.assemble import build
from composeformer.costs import cost
from composeformer.costs.counts import active_parameters
from composeformer.spec import Spec, shipped


@attrs.frozen(kw_only=True)
class Facts:
    """`training` is FLOPs per token in sequences of 4096, causal: three forwards."""

    total: int
    active: tuple[int, int, int]
    cache_bytes_per_token: int
    training: int
    predictor: int = 0
    training_with_predictor: int | None = None
    router_biases: int = 0


def dense(total: int, embedding: int, cache: int, training: int, *, tied: bool = False) -> Facts:
    """All parameters are active; `embedding` is one matrix of the vocabulary."""
    active = (total, total, total - embedding) if tied else (total, total - embedding, total - 2 * embedding)
    return Facts(total=total, active=active, cache_bytes_per_token=cache, training=training)


FACTS = {
    "smollm2-135m": dense(134_515_008, 28_311_552, 23_040, 1_231_552_512, tied=True),
    "llama-3.1-8b": dense(8_030_261_248, 525_336_576, 131_072, 48_249_176_064),
    "llama-2-7b": dense(6_738_415_616, 131_072_000, 524_288, 42_863_689_728),
    "qwen2.5-72b": dense(72_706_203_648, 1_245_708_288, 327_680, 444_856_270_848),
    "llama-3.1-405b": dense(405_853_388_800, 2_101_346_304, 516_096, 2_473_221_685_248),
    "deepseek-v3": Facts(
        total=671_026_404_352,
        active=(37_552_282_624, 36_625_603_584, 35_698_924_544),
        cache_bytes_per_token=70_272,
        training=249_811_304_448,
        predictor=11_610_067_968,
        training_with_predictor=259_992_059_904,
        router_biases=14_848,
    ),
    "deepseek-v2": Facts(
        total=235_741_434_880,
        active=(21_375_800_320, 20_851_512_320, 20_327_224_320),
        cache_bytes_per_token=69_120,
        training=155_013_611_520,
    ),
    "deepseek-v2-lite": Facts(
        total=15_706_484_224,
        active=(2_661_150_208, 2_451_435_008, 2_241_719_808),
        cache_bytes_per_token=31_104,
        training=16_386_097_152,
    ),
    "qwen3-30b-a3b": Facts(
        total=30_532_122_624,
        active=(3_353_032_704, 3_041_867_776, 2_730_702_848),
        cache_bytes_per_token=98_304,
        training=23_006_281_728,
    ),
    "mixtral-8x7b": Facts(
        total=46_702_792_704,
        active=(12_879_925_248, 12_748_853_248, 12_617_781_248),
        cache_bytes_per_token=131_072,
        training=79_706_456_064,
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_counts_are_exact(name: str) -> None:
    counts, facts = cost(name), FACTS[name]
    assert counts.total == facts.total
    assert attrs.astuple(counts.active) == facts.active
    assert counts.predictor == facts.predictor
    assert counts.buffers == ({"router_bias": facts.router_biases} if facts.router_biases else {})
    assert counts.cache_bytes_per_token == facts.cache_bytes_per_token


@pytest.mark.parametrize("name", FACTS)
def test_operations_are_exact(name: str) -> None:
    flops, facts = cost(name, context=4096).flops_per_token, FACTS[name]
    assert flops.training == 3 * flops.forward == facts.training
    assert flops.training_with_predictor == (facts.training_with_predictor or facts.training)


def test_every_model_that_is_not_tiny_has_its_facts() -> None:
    assert set(FACTS) == {name for name in shipped() if not name.startswith("tiny-")}


@pytest.mark.parametrize("name", FACTS)
def test_a_cache_holds_what_is_told_and_no_more(name: str) -> None:
    model = build(name, device="meta", dtype="bfloat16")
    assert model.new_cache(3, 128).num_bytes == 3 * 128 * FACTS[name].cache_bytes_per_token


def test_the_predictor_of_deepseek_v3_is_that_of_the_released_weights() -> None:
    """They hold copies of the embedding and of the head beside it; here it shares the model's own."""
    spec = Spec.load("deepseek-v3")
    counts, predictor = cost(spec), spec.plan.predictor
    assert predictor is not None
    matrix = spec.model.vocab_size * spec.model.hidden_size
    assert counts.predictor + 2 * matrix == 13_463_426_048
    join = predictor.linears["depths.0.eh_proj"]
    assert join.weight.elements == 102_760_448
    active = sum(active_parameters(node) for node in predictor.walk() if node.slot != "norm")
    assert active - join.weight.elements == 585_302_016
    biases = [w.elements for node in predictor.walk() for w in node.weights.values() if not w.trains]
    assert biases == [256]


def test_the_elements_of_the_released_checkpoint_are_accounted_for() -> None:
    """684,531,386,000 elements: 680,571,043,840 in fp8, a scale for each of their blocks of 128 x 128, the rest."""
    spec = Spec.load("deepseek-v3")
    plan, block = spec.plan, 128
    coded = [one for role, one in plan.linears.items() if not one.sensitive and not role.startswith("head.")]
    elements = sum(one.weight.elements for one in coded)
    scales = sum((one.groups or 1) * ceil(one.outputs / block) * ceil(one.inputs / block) for one in coded)
    assert (elements, scales) == (680_571_043_840, 41_540_496)
    copies = 2 * spec.model.vocab_size * spec.model.hidden_size
    stored = sum(weight.elements for weight in plan.tensors.values()) + copies
    biases = sum(weight.elements for weight in plan.tensors.values() if not weight.trains)
    assert stored - elements - biases == 3_918_786_560
    assert stored + scales == 684_531_386_000


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3"])
def test_the_first_layers_are_dense(name: str) -> None:
    ffns: list[Any] = [layer.ffn.kind for layer in Spec.load(name).layers if layer.ffn is not None]
    first = 3 if name == "deepseek-v3" else 1
    assert ffns == ["swiglu"] * first + ["moe"] * (len(ffns) - first)
