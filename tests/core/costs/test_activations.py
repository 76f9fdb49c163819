"""Declared activations are those that autograd keeps, within 10%: of any model, and of each part."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from composeformer.config import Config, config
from composeformer.contracts import Component, Cost, Declared, Implementation, Linear, Phase, Saved
from composeformer.costs import memory
from composeformer.costs.activations import Training, again, objective, per_token, serving, unknown
from composeformer.costs.layout import Layout
from composeformer.costs.report import Report
from composeformer.plan import Node
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry
from composeformer.site import Site
from composeformer.spec import Spec, inherit
from composeformer.spec.document import from_data
from composeformer.testing.activations import counted
from composeformer.testing.specs import specs

# Most are exact. Small things are not declared: what a predictor's depths leave out, what a cast would have copied.
WITHIN = 0.1
# Indices are kept of all experts where there are no more scores than this, of those chosen beyond it.
FEW = 4096
PRECISIONS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "bf16": {"kind": "bf16"},
    "full-bfloat16": {"kind": "full", "dtype": "bfloat16"},
    "fp8-block": {"kind": "fp8-block"},
}
ENDS = ("predictor", "head", "objective")  # a prediction runs the head and the loss again


def places(spec: Spec) -> dict[str, list[Node]]:
    """Every part with those in it, by its path; the ends together."""
    plan = spec.plan
    found = {node.path: [*node.walk()] for layer in plan.layers for node in layer.values()}
    found |= {"embedding": [*plan.embedding.walk()], "residual": [*plan.residual.walk()]}
    ends = [*plan.head.walk(), objective(spec)]
    return {**found, "ends": ends + ([] if plan.predictor is None else [*plan.predictor.walk()])}


def declared(nodes: Iterable[Node], how: Training) -> float:
    listed = list(nodes)
    return per_token(listed, how) + sum(again(node, how) for node in listed)


def by_place(found: Mapping[str, float], spec: Spec) -> dict[str, float]:
    """What was counted of modules, of the parts that they are in."""
    sums = dict.fromkeys(places(spec), 0.0)
    for module, size in found.items():
        at = next((path for path in sums if f"{module}.".startswith(f"{path}.")), None)
        sums["ends" if module.startswith(ENDS) else str(at)] += size
    return sums


def check(spec: Spec, rows: int, tokens: int) -> None:
    """All of a model's activations, and those of each part."""
    found = counted(spec, rows, tokens)
    how = Training(context=tokens, device="cpu")
    assert unknown(node for nodes in places(spec).values() for node in nodes) == ()
    whole = declared([*spec.plan.nodes(), objective(spec)], how)
    assert whole == pytest.approx(sum(found.values()), rel=WITHIN)
    for path, size in by_place(found, spec).items():
        assert declared(places(spec)[path], how) == pytest.approx(size, rel=WITHIN), path


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-deepseek-v3", "tiny-moe"])
def test_shipped_models_keep_what_is_declared(name: str, precision: str) -> None:
    check(Spec.load(name).with_(precision=PRECISIONS[precision]), 16, 48)


@pytest.mark.parametrize(("rows", "tokens"), [(260, 3), (33, 17), (4, 200)])
def test_so_do_they_in_batches_of_any_shape(rows: int, tokens: int) -> None:
    spec = Spec.load("tiny-moe", ["mixer.attention.implementation=reference"])
    check(spec, rows, tokens)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny-llama", ["mixer.attention.implementation=reference"]),
        ("tiny-llama", ["mixer.attention.cap=5", "mixer.attention.num_kv_heads=4"]),
        ("tiny-llama", ["mixer.attention.sinks=true", "mixer.attention.qk_norm=rms"]),
        ("tiny-llama", ["mixer.attention.qk_norm=rms", "position.rope.fraction=0.5"]),
        ("tiny-llama", ["ffn.dense.activation=relu", "head.kind=linear", "head.cap=3"]),
        ("tiny-llama", ["ffn.dense.activation=relu2", "ffn.dense.bias=true"]),
        ("tiny-llama", ["ffn.dense.activation=relu2", "ffn.dense.gated=false"]),
        ("tiny-llama", ["ffn.dense.activation=relu", "ffn.dense.gated=false", "norm.rms.kind=layernorm"]),
        ("tiny-deepseek-v3", ["mixer.mla.implementation=reference"]),
        ("tiny-deepseek-v3", ["mixer.mla.implementation=absorbed"]),
        ("tiny-deepseek-v3", ["mixer.mla.v_head_dim=32"]),
        ("tiny-deepseek-v3", ["mixer.mla.v_head_dim=40", "ffn.experts.router.normalize=false"]),
        ("tiny-deepseek-v3", ["ffn.experts.implementation=batched"]),
        ("tiny-deepseek-v3", ["ffn.experts.implementation=reference", "predictor.depth=2"]),
        ("tiny-moe", ["ffn.experts.router.normalize=false", "ffn.experts.router.z_alpha=0"]),
        ("tiny-moe", ["ffn.experts.router.balance_alpha=0", "ffn.experts.num_shared_experts=2"]),
    ],
)
@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_every_option_keeps_what_is_declared(name: str, changes: list[str], precision: str) -> None:
    check(Spec.load(name, changes).with_(precision=PRECISIONS[precision]), 16, 48)


@settings(max_examples=25, deadline=None)
@given(specs(run=False), st.sampled_from(sorted(PRECISIONS)))
def test_any_model_keeps_what_is_declared(data: dict[str, Any], precision: str) -> None:
    # A reference that reads the matrices of scaled maps multiplies in fp32, which it does not declare.
    chosen = unchosen(data) if precision == "fp8-block" else data
    spec = Spec.from_dict({**chosen, "precision": PRECISIONS[precision]})
    tokens = 64  # of which a predictor's depth k leaves out k
    assume(spec.model.max_position_embeddings >= tokens)
    rows = FEW // 2 // tokens + 1
    found = counted(spec, rows, tokens)
    whole = declared([*spec.plan.nodes(), objective(spec)], Training(context=tokens, device="cpu"))
    assert whole == pytest.approx(sum(found.values()), rel=WITHIN)


def unchosen(data: Any) -> Any:
    """The same data where no implementation is asked for."""
    if isinstance(data, Mapping):
        return {key: unchosen(value) for key, value in data.items() if key != "implementation"}
    return [unchosen(each) for each in data] if isinstance(data, list) else data


@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_a_loss_in_pieces_keeps_the_logits_that_it_is_made_of_again(precision: str) -> None:
    """Probabilities of a piece are made again; logits and labels are kept."""
    spec = Spec.load("tiny-llama").with_(precision=PRECISIONS[precision])
    pieces = spec.with_({"objective.kind": "next-token", "objective.chunk_tokens": 8})
    told = declared([objective(pieces)], Training(context=48))
    assert told == 4 * spec.model.vocab_size + 8
    assert counted(pieces, 16, 48)["objective"] == pytest.approx(told, rel=WITHIN)


# By layout


def test_a_pipeline_has_in_flight_what_its_schedule_keeps() -> None:
    """Table 2 of arXiv 2412.19437: P micro-batches of the first stage, P + 1 under DualPipe on every device."""
    told = {"parallel.pipeline": 3, "train.batch_size": 64, "train.micro_batches": 64}
    spec = Spec.load("tiny-llama").with_(told)
    for schedule in ("1f1b", "zero-bubble"):
        found = memory.training(spec.with_({"parallel.schedule": schedule}))
        assert [each.in_flight for each in found] == [3, 2, 1]
        assert len({each.tokens for each in found}) == 1
    # An even number of stages, each of both directions.
    plain = memory.training(spec.with_({"parallel.pipeline": 2}))
    both = memory.training(spec.with_({"parallel.pipeline": 2, "parallel.schedule": "dualpipe"}))
    assert [each.in_flight for each in both] == [3, 3]
    one = [each.activations / each.in_flight for each in plain if each.activations is not None]
    assert [each.activations for each in both] == [
        pytest.approx(2 * one[0] + one[1]),
        pytest.approx(one[1] + 2 * one[0]),
    ]


@settings(max_examples=30, deadline=None)
@given(
    pipeline=st.integers(1, 3),
    tensor=st.sampled_from([1, 2]),
    replicas=st.integers(1, 4),
    micro=st.integers(1, 8),
    length=st.integers(1, 512),
    recompute=st.sampled_from(["none", "selective", "full"]),
)
def test_a_device_keeps_no_more_than_the_whole_model_for_all_tokens_of_its_replica(
    pipeline: int, tensor: int, replicas: int, micro: int, length: int, recompute: str
) -> None:
    changes = {
        "parallel.pipeline": pipeline,
        "parallel.tensor": tensor,
        "parallel.recompute": recompute,
        "train.micro_batches": micro,
        "train.batch_size": micro * replicas,
        "train.sequence_length": length,
    }
    spec = Spec.load("tiny-llama").with_(changes)
    found = memory.training(spec, Layout(spec=spec, devices=pipeline * tensor * replicas))
    whole = declared([*spec.plan.nodes(), objective(spec)], Training(context=length))
    for stage, each in enumerate(found):
        assert each.tokens == length
        assert each.in_flight == min(pipeline - stage, micro)
        assert each.activations is not None
        # What is made again is beside what waits, of one micro-batch.
        assert 0 < each.activations <= whole * length * (each.in_flight + 1)
        assert each.total >= each.activations


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["llama-3.1-8b", "deepseek-v3", "tiny-moe"])
def test_recomputation_keeps_less_and_of_whole_layers_the_stream_alone(name: str, precision: str) -> None:
    changes = {"parallel.pipeline": 1, "train.batch_size": 8, "train.micro_batches": 1}
    spec = Spec.load(name).with_({**changes, "precision": PRECISIONS[precision]})
    none, selective, full = (
        memory.training(spec.with_({"parallel.recompute": choice}))[0].activations
        for choice in ("none", "selective", "full")
    )
    assert none is not None
    assert selective is not None
    assert full is not None
    assert full < selective < none
    plan, how = spec.plan, Training(context=memory.micro_batch(spec, Layout(spec=spec, devices=1)).length)
    layers = [declared([n for top in layer.values() for n in top.walk()], how) for layer in plan.layers]
    ends = [plan.embedding, plan.residual, plan.head, *([plan.predictor] if plan.predictor else [])]
    beyond = declared([*(n for top in ends for n in top.walk()), objective(spec)], how)
    width = 4 if precision == "full" else 2
    stream = spec.model.hidden_size * width
    tokens = memory.training(spec)[0].tokens
    assert full == pytest.approx(tokens * (len(layers) * stream + beyond + max(layers) - stream))


def test_tensor_parallelism_divides_heads_and_widths_not_the_stream() -> None:
    spec = Spec.load("llama-3.1-8b").with_({"precision": PRECISIONS["bf16"]})
    nodes = [n for top in spec.plan.layers[0].values() for n in top.walk()]
    one, eight = (per_token(nodes, Training(context=8192, tensor=n)) for n in (1, 8))
    # Of the layer's bytes for a token those that all devices have: two norms in fp32, and what they give.
    whole = 2 * (4 * 4096 + 4 + 2 * 4096) + 2 * 2 * 4096
    assert one - whole == pytest.approx(8 * (eight - whole))


def test_a_layer_of_llama_keeps_what_its_sizes_say() -> None:
    """8 billion parameters, bfloat16, fused attention: sums by hand of what each operation reads in its gradient."""
    spec = Spec.load("llama-3.1-8b").with_({"precision": PRECISIONS["bf16"]})
    D, kv, inner, H = 4096, 1024, 14336, 32
    norms = 2 * (4 * D + 4 + 2 * D)
    attention = 2 * (D + D + 2 * kv + D) + 4 * H
    network = 2 * (D + 4 * inner)
    nodes = [n for top in spec.plan.layers[0].values() for n in top.walk()]
    assert per_token(nodes, Training(context=8192)) == norms + attention + network


# What is not said


@config
class Silent(Config):
    """A network that says nothing of what it keeps."""

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="map", inputs=site.width, outputs=site.width)


@config
class Told(Silent):
    """The same, which says that it keeps its input."""

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Saved(name="input", inputs=("map",))


def test_a_part_that_does_not_say_what_it_keeps_is_unknown_and_not_zero() -> None:
    told, silent = with_network(Told), with_network(Silent)
    (known,), (not_known,) = memory.training(told), memory.training(silent)
    assert known.silent == ()
    assert known.activations is not None
    assert known.total > known.activations > 0
    assert not_known.silent == ("ffn mine",)
    assert not_known.activations is None
    assert not_known.total == pytest.approx(known.total - known.activations)
    section = Report(silent).sections["memory of a device"]
    assert section["activations"].value is None
    assert "ffn mine" in section["activations"].definition
    assert section["all"].definition == "activations aside"
    assert section["all"].value == not_known.total


def with_network(kind: type[Config]) -> Spec:
    """Two layers of this network alone."""
    part = Component("ffn", "mine", kind, (Implementation("reference", "never.imported:Module"),))
    own = PluginInfo(
        name="own", distribution="own", version="1", origin="own", status="loaded", components=(part,)
    )
    registry = Registry((*current().registry.infos, own))
    layers = [{"repeat": 2, "mixer": False}]
    data = {**Spec.load("tiny-llama").to_dict(), "ffn": {"kind": "mine"}, "layers": layers}
    del data["mixer"]
    return Spec(inherit.resolve(from_data(data), None), registry)


def test_what_is_kept_is_what_the_implementation_that_serves_keeps() -> None:
    """Odd widths have no grouped product and are multiplied in blocks; one that is asked for is meant."""
    spec = Spec.load("tiny-moe")
    ffn = spec.plan.layers[0]["ffn"]
    assert serving(ffn, "cuda") == "grouped"
    odd = spec.with_({"ffn.experts.intermediate_size": 63}).plan.layers[0]["ffn"]
    assert serving(odd, "cuda") == "batched"
    asked = spec.with_({"ffn.experts.implementation": "reference"}).plan.layers[0]["ffn"]
    assert serving(asked, "cuda") == "reference"
    how = Training(context=64)
    assert per_token([odd], how) > per_token([ffn], how) > 0.9 * per_token([asked], how)
