"""Operations by component sum to the totals, follow closed forms, and decoding's bytes are what is read."""

from io import StringIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from composeformer.cli.cost_command import cost_table
from composeformer.config import Config, config
from composeformer.contracts import SUBLAYERS, Component, Declared, Implementation, Linear
from composeformer.costs import compute, cost
from composeformer.costs.printing import document, markdown
from composeformer.costs.report import Report
from composeformer.errors import InputError
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry
from composeformer.site import Site
from composeformer.spec import Spec, inherit
from composeformer.spec.document import from_data

ZOO = ("deepseek-v3", "deepseek-v2-lite", "llama-3.1-8b", "mixtral-8x7b", "qwen3-30b-a3b", "tiny-deepseek-v3")


@pytest.mark.parametrize("name", ZOO)
@settings(max_examples=5, deadline=None)
@given(context=st.integers(1, 500_000), causal=st.booleans())
def test_components_sum_to_the_published_convention(name: str, context: int, causal: bool) -> None:
    spec = Spec.load(name)
    told = cost(spec, context=context, causal=causal).flops_per_token
    found = compute.forward(spec, context=context, causal=causal)
    assert compute.total(found) == pytest.approx(told.forward, rel=1e-12)
    whole = compute.forward(spec, context=context, causal=causal, predictor=True)
    assert 3 * compute.total(whole) == pytest.approx(told.training_with_predictor, rel=1e-12)


def test_routers_are_told_apart_and_counted_when_asked() -> None:
    spec = Spec.load("deepseek-v3")
    plain = compute.forward(spec, context=4096)
    counted = compute.forward(spec, context=4096, routers=True)
    assert plain["router sigmoid-bias"].total == 0
    assert counted["router sigmoid-bias"].linear == 58 * 2 * 7168 * 256
    assert compute.total(counted) - compute.total(plain) == counted["router sigmoid-bias"].total


def test_a_causal_mask_halves_what_a_full_one_sees() -> None:
    spec = Spec.load("llama-3.1-8b")
    half, whole = (
        compute.forward(spec, context=4096, causal=causal)["mixer gqa"] for causal in (True, False)
    )
    assert 2 * half.core == whole.core == 32 * 4 * 4096 * 4096
    assert half.linear == whole.linear


def test_absorbed_decoding_and_grouped_attention_as_published() -> None:
    """242 and 16 operations a byte: numbers of arXiv 2505.09343's models, bfloat16."""
    latent = compute.attention_intensity(Spec.load("deepseek-v3"))
    grouped = compute.attention_intensity(Spec.load("llama-3.1-405b"))
    assert latent == {"mixer mla": pytest.approx(278528 / 1152)}
    assert grouped == {"mixer gqa": 65536 / 4096}


@settings(max_examples=20, deadline=None)
@given(context=st.integers(1, 10**6), batch=st.integers(1, 4096))
def test_decoding_a_dense_model_is_its_closed_form(context: int, batch: int) -> None:
    spec = Spec.load("llama-3.1-8b")
    counts = cost(spec)
    found = compute.decode(spec, context=context, batch=batch)
    # Norms are read and do no products; the embedding gives one row.
    norms = 65 * 4096
    products = counts.active.without_input_embedding - norms
    assert found.operations == pytest.approx(batch * (2 * products + 32 * 4 * 4096 * context))
    assert found.weight_bytes == 2 * counts.active.without_input_embedding
    assert found.cache_bytes == batch * context * counts.cache_bytes_per_token
    assert found.intensity == found.operations / (found.weight_bytes + found.cache_bytes)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 10**6))
def test_a_batch_reads_more_experts_but_never_more_than_there_are(batch: int) -> None:
    spec = Spec.load("mixtral-8x7b")
    one, many, more = (compute.decode(spec, context=1, batch=b) for b in (1, batch, batch + 1))
    counts = cost(spec)
    assert one.weight_bytes == pytest.approx(2 * counts.active.without_input_embedding)
    assert one.weight_bytes <= many.weight_bytes <= more.weight_bytes
    assert more.weight_bytes <= 2 * (counts.total - 32000 * 4096) * (1 + 1e-12)
    assert many.operations == pytest.approx(batch * one.operations)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b", "deepseek-v3"])
@pytest.mark.parametrize("context", [1, 4096])
def test_components_of_decoding_sum_to_it_and_a_draft_is_the_predictors(name: str, context: int) -> None:
    spec = Spec.load(name)
    alone, drafted = (compute.decoding(spec, context=context, predictor=each) for each in (False, True))
    assert 64 * compute.total(alone) == compute.decode(spec, context=context, batch=64).operations
    if spec.plan.predictor is None:
        assert drafted == alone
        return
    # One layer of 61, the join of two streams, and the head again.
    own = {name: drafted[name].total - alone[name].total for name in alone}
    assert own["head linear"] == alone["head linear"].total
    assert 61 * own["mixer mla"] == alone["mixer mla"].total
    assert 58 * own["ffn moe"] == alone["ffn moe"].total
    assert drafted["predictor mtp"].total == 2 * 2 * 7168 * 7168


def test_bytes_follow_the_precision_that_is_stated() -> None:
    wide = Spec.load("llama-3.1-8b", ["precision.kind=full", "precision.dtype=float32"])
    assert (
        compute.decode(wide, context=8).weight_bytes
        == 2 * compute.decode(Spec.load("llama-3.1-8b"), context=8).weight_bytes
    )
    narrow = compute.decode(Spec.load("deepseek-v3"), context=8)
    plain = compute.decode(Spec.load("deepseek-v3", ["precision.kind=bf16"]), context=8)
    assert narrow.weight_bytes < 0.6 * plain.weight_bytes


@config
class Silent(Config):
    """A part that says nothing of its cost."""

    def tensors(self, site: Site) -> Any:
        declared: list[Declared] = [Linear(name="map", inputs=site.width, outputs=site.width)]
        return declared


def silent(slot: str) -> Spec:
    """The tiny model with parts of one slot that state no cost."""
    part = Component(slot, "silent", Silent, (Implementation("reference", "never.imported:Module"),))
    own = PluginInfo(
        name="own", distribution="own", version="1", origin="own", status="loaded", components=(part,)
    )
    registry = Registry((*current().registry.infos, own))
    data = {**Spec.load("tiny-llama").to_dict(), slot: {"kind": "silent"}, "layers": [{"repeat": 2}]}
    data["cost"] = {"tokens": 1e9}
    return Spec(inherit.resolve(from_data(data), None), registry)


@pytest.mark.parametrize("slot", SUBLAYERS)
def test_a_sublayer_that_states_no_cost_is_unknown_and_not_zero(slot: str) -> None:
    spec, name = silent(slot), f"{slot} silent"
    assert compute.unknown(spec) == (name,)
    assert compute.unknown(Spec.load("tiny-llama")) == ()
    found = Report(spec)
    told = found.sections
    assert told["operations of a token"][f"products of {name}"].value is None
    # Sums that lack it say so, a price among them.
    for section, key in (
        ("operations of a token", "training"),
        ("decoding", "operations, batch 1"),
        ("run", "operations"),
    ):
        assert told[section][key].definition.startswith(f"at least, without what {name} computes"), key
    made = document(found)
    assert made["unknown"] == [name]
    assert name in made["flops_per_token"]["convention"]
    # What a feed-forward part computes is unknown; it caches nothing in any case.
    cached = (made["cache_bytes_per_token"], made["cache_bytes_at_context"])
    assert (cached == (None, None)) == (slot == "mixer")
    assert (told["parameters"]["cache of a token"].value is None) == (slot == "mixer")
    assert (told["decoding"]["intensity, batch 1"].value is None) == (slot == "mixer")
    assert "unknown" in markdown(found)
    screen = Console(file=StringIO(), width=200)
    screen.print(cost_table(found.counts))
    assert isinstance(screen.file, StringIO)
    assert ("unknown" in screen.file.getvalue()) == (slot == "mixer")


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (1, 0), (-1, 1)])
def test_no_tokens_and_no_sequences_are_refused(context: int, batch: int) -> None:
    with pytest.raises(InputError, match="must be >= 1"):
        compute.decode(Spec.load("tiny-llama"), context=context, batch=batch)
