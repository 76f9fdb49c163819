"""A step on paper: operations are the model's, bytes are the ledger's and the rings', the bubble is the schedule's."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.contracts import Exchange
from composeformer.costs import compute, memory
from composeformer.costs.counts import stated
from composeformer.costs.hardware import load
from composeformer.costs.layout import Layout, layout
from composeformer.costs.report import Report
from composeformer.costs.steps import Steps, bubble
from composeformer.costs.traffic import Traffic, of_hardware
from composeformer.errors import InputError
from composeformer.spec import Spec

H800 = load("h800")


def steps(name: str, *changes: str) -> Steps:
    spec = Spec.load(name, list(changes))
    return Steps(spec, layout(spec), H800)


def test_deepseek_v3s_step_is_its_published_one_at_the_published_utilisation() -> None:
    """19.926 seconds of arXiv 2505.09343, table 4; at peak and with nothing hidden, bounds on both sides."""
    section = Report(Spec.load("deepseek-v3")).sections["optimizer step"]
    seconds = {name: quantity.value for name, quantity in section.items()}
    assert seconds["tokens"] == 15360 * 4096 // 128
    assert seconds["at the utilisation of the run"] == pytest.approx(19.926, rel=1e-3)
    assert seconds["least"] < 19.926 < seconds["least, nothing hidden"]


@settings(max_examples=20, deadline=None)
@given(
    pipeline=st.integers(1, 4),
    rows=st.integers(1, 3),
    length=st.integers(1, 64),
    micro=st.sampled_from([1, 2]),
)
def test_stages_together_do_the_models_operations(pipeline: int, rows: int, length: int, micro: int) -> None:
    changes = {"parallel.pipeline": pipeline, "train.sequence_length": length, "train.micro_batches": micro}
    spec = Spec.load("tiny-deepseek-v3").with_({**changes, "train.batch_size": rows * micro})
    if pipeline > len(spec.layers):
        return
    made = Steps(spec, layout(spec), H800)
    found = sum(roof.operations for stage in range(pipeline) for roof in made._stage(stage).roofs.values())
    each = compute.total(compute.forward(spec, context=length, predictor=True, routers=True))
    assert found == pytest.approx(3 * each * rows * micro * length)


def test_experts_send_what_their_backend_declares() -> None:
    changes = ["parallel.expert=4", "train.batch_size=8", "train.sequence_length=32", "cost.gpus=4"]
    spec = Spec.load("tiny-deepseek-v3", changes).with_(comm={"kind": "collective", "ranks_per_node": 2})
    placed = layout(spec)
    traffic = Traffic(spec, placed, H800, 0)
    assert traffic.tokens == 2 * 32
    config: Any = spec.single("comm").config
    wanted = {"intra": 0.0, "inter": 0.0}
    for node in spec.plan.nodes():
        moved = [cost for cost in stated(node, "train") if isinstance(cost, Exchange)]
        if moved:
            groups = next(linear.groups for linear in node.linears.values() if linear.shard == "group")
            limit = traffic._limit(node)
            ledger = config.expected(moved, tokens=64, groups=groups, ranks=4, activation=2, nodes=limit)
            for link in wanted:
                wanted[link] += ledger.volume(link=link).sent  # type: ignore[arg-type]
    found = {sent.link: sent.bytes for sent in traffic.sent if sent.purpose == "experts"}
    assert found == {link: pytest.approx(size) for link, size in wanted.items()}
    assert found["intra"] > 0


def test_rings_of_replicas_send_their_share() -> None:
    """Two replicas, in fp32: an all-reduce of gradients; half of it with ZeRO; weights for every pass with ZeRO-3."""
    count = Report(Spec.load("tiny-llama")).counts.total

    def moved(zero: int) -> dict[str, float]:
        spec = Spec.load(
            "tiny-llama",
            ["cost.gpus=2", "train.batch_size=4", "train.micro_batches=2", f"parallel.zero={zero}"],
        )
        sent = Traffic(spec, layout(spec), H800, 0).sent
        assert {each.link for each in sent} == {"intra"}
        return {each.purpose: each.bytes for each in sent}

    half = 4 * count / 2
    assert moved(0) == {"gradients": 2 * half}
    assert moved(1) == moved(2) == {"gradients": half, "weights": half}
    assert moved(3) == {"gradients": half, "weights": 4 * half}


@pytest.mark.parametrize(
    ("precision", "gathered", "summed"),
    [
        ({"kind": "fp8-block"}, 4, 4),
        ({"kind": "fp8-block", "weights": "bfloat16"}, 2, 2),
        ({"kind": "bf16"}, 4, 4),
        ({"kind": "bf16", "weights": "bfloat16"}, 2, 2),
    ],
)
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_rings_move_what_the_policy_declares(
    precision: dict[str, str], gathered: int, summed: int, zero: int
) -> None:
    """Weights of linear maps as they are gathered, gradients as they are summed; what is sensitive in fp32."""
    run = {"cost.gpus": 2, "train.batch_size": 4, "parallel.zero": zero}
    spec = Spec.load("tiny-llama").with_(run, precision=precision)
    maps = sum(
        linear.weight.elements for role, linear in spec.plan.linears.items() if role != "head.projection"
    )
    others = 4 * (Report(spec).counts.total - maps)
    weights, gradients = gathered * maps + others, summed * maps + others
    sent = {each.purpose: each.bytes for each in Traffic(spec, layout(spec), H800, 0).sent}
    assert sent["gradients"] == (gradients if zero == 0 else gradients / 2)
    assert sent.get("weights", 0) == {0: 0, 1: weights / 2, 3: weights}[zero]
    (held,) = memory.training(spec)
    assert (held.weights, held.gradients) == (
        (weights / 2, gradients / 2) if zero == 3 else (weights, gradients)
    )


@pytest.mark.parametrize(
    ("name", "tied", "copied"),
    [
        ("tiny-llama", True, 256 * 64),
        ("tiny-llama", False, 0),
        ("tiny-deepseek-v3", False, 256 * 64),
        ("tiny-deepseek-v3", True, 256 * 64),
    ],
)
def test_stages_that_hold_the_same_sum_its_gradients(name: str, tied: bool, copied: int) -> None:
    """A tied matrix, or the embedding that a predictor reads: of both ends, an all-reduce in fp32."""
    run = ["parallel.pipeline=3", "cost.gpus=6", "train.batch_size=2", "train.sequence_length=16"]
    run.append(f"model.tie_embeddings={str(tied).lower()}")

    def moved(*changes: str) -> list[float]:
        spec = Spec.load(name, [*run, *changes])
        found = [Traffic(spec, layout(spec), H800, stage).sent for stage in range(spec.parallel.pipeline)]
        return [sum(each.bytes for each in sent if each.purpose == "copies") for sent in found]

    assert moved("parallel.zero=0") == [4 * copied, 0, 4 * copied]
    # Of what replicas share out, each sums its part.
    assert moved("parallel.zero=1") == [2 * copied, 0, 2 * copied]
    # Both are on one device, and its copy is one.
    assert moved("parallel.pipeline=2", "cost.gpus=4", "parallel.schedule=dualpipe") == [0, 0]


def test_devices_that_share_maps_sum_their_outputs() -> None:
    spec = Spec.load(
        "tiny-llama", ["parallel.tensor=2", "cost.gpus=2", "train.batch_size=1", "train.sequence_length=8"]
    )
    sent = {each.purpose: each for each in Traffic(spec, layout(spec), H800, 0).sent}
    # Two maps a layer whose outputs are summed, forward and backward: an all-reduce of 8 tokens of 64 in bfloat16.
    assert sent["activations"].bytes == 3 * 2 * 2 * (8 * 64 * 2) * 2 * (1 / 2)
    assert sent["activations"].link == "intra"


def test_devices_that_share_maps_share_out_tokens_before_experts() -> None:
    """None computes an expert for a token that another does, or sends it: half each, and results are gathered."""
    run = ["train.batch_size=2", "train.sequence_length=8", "comm.kind=collective", "comm.ranks_per_node=2"]
    one, two = (
        Spec.load("tiny-moe", [*run, f"parallel.tensor={n}", f"cost.gpus={2 * n}", "parallel.expert=2"])
        for n in (1, 2)
    )
    alone, both = (Steps(spec, layout(spec), H800)._stage(0) for spec in (one, two))
    assert alone.traffic.tokens == 8
    whole = Spec.load("tiny-moe", ["parallel.tensor=1", "cost.gpus=1", *run])
    single = Steps(whole, layout(whole), H800)._stage(0).roofs["ffn moe"].operations
    assert alone.roofs["ffn moe"].operations == pytest.approx(single / 2)
    assert both.roofs["ffn moe"].operations == pytest.approx(single / 4)

    def sent(found: Traffic, purpose: str) -> float:
        return sum(each.bytes for each in found.sent if each.purpose == purpose)

    assert sent(alone.traffic, "activations") == 0
    per_map = 2 * (8 * 64 * 2) * 2 * (1 / 2)
    layers = len(two.layers)
    # Attention's output, forward and backward; half of an all-reduce for the experts' results, forward and backward.
    assert sent(both.traffic, "activations") == layers * (per_map + per_map / 2)


@given(st.integers(3, 61).filter(lambda stages: stages % 2 == 1))
@settings(max_examples=5, deadline=None)
def test_dualpipe_has_two_directions_of_as_many_stages(stages: int) -> None:
    spec = Spec.load("deepseek-v3", [f"parallel.pipeline={stages}", f"cost.gpus={stages * 64}"])
    with pytest.raises(
        InputError, match=f"parallel.pipeline = {stages}: must be even under the schedule dualpipe"
    ):
        layout(spec)


def test_a_middle_stage_sends_both_ways_and_an_end_one() -> None:
    spec = Spec.load("tiny-llama", ["parallel.pipeline=3", "train.batch_size=2", "train.sequence_length=16"])
    found = [
        sum(each.bytes for each in Traffic(spec, layout(spec), H800, stage).sent if each.purpose == "stages")
        for stage in range(3)
    ]
    assert found == [2 * 16 * 64 * 2, 2 * 2 * 16 * 64 * 2, 2 * 16 * 64 * 2]


@given(st.integers(2, 64), st.integers(1, 200), st.floats(0.1, 100.0))
def test_bubbles_are_those_of_their_schedules(stages: int, micro: int, seconds: float) -> None:
    forward = seconds / micro / 3
    plain, zero, dual = (bubble(name, stages, micro, seconds) for name in ("1f1b", "zero-bubble", "dualpipe"))
    assert plain == pytest.approx((stages - 1) * 3 * forward)
    assert zero == pytest.approx((stages - 1) * (1 + 2 - 2) * forward)
    assert dual == pytest.approx((stages / 2 - 1) * (3 + 2 - 3) * forward, abs=1e-12)
    assert dual <= zero <= plain
    assert bubble("1f1b", 1, micro, seconds) == 0


def test_a_component_is_bound_by_what_is_slower() -> None:
    """A single token reads all weights for few products; many tokens read them once."""
    few = steps("llama-3.1-8b", "train.batch_size=1", "train.sequence_length=1").slowest
    many = steps("llama-3.1-8b", "train.batch_size=64", "train.sequence_length=4096").slowest
    assert {roof.bound for roof in few.roofs.values()} == {"memory"}
    assert many.roofs["ffn swiglu"].bound == "compute"
    for roof in (*few.roofs.values(), *many.roofs.values()):
        assert roof.seconds == max(roof.compute_seconds, roof.memory_seconds)


def test_narrow_formats_are_multiplied_at_their_own_peak() -> None:
    given = ("train.batch_size=64", "train.sequence_length=4096")
    wide = steps("llama-3.1-8b", *given, "precision.kind=bf16").slowest.roofs["ffn swiglu"]
    narrow = steps("llama-3.1-8b", *given, "precision.kind=fp8-block").slowest.roofs["ffn swiglu"]
    assert narrow.compute_seconds == pytest.approx(wide.compute_seconds / 2)


@pytest.mark.parametrize("peak", ["bfloat16", "float8_e4m3fn"])
def test_each_dtype_has_its_own_peak_whatever_utilisation_is_measured_against(peak: str) -> None:
    """Attention in bfloat16 is no faster for a peak of FP8, and FP8 no slower for one of bfloat16."""
    given = ("train.batch_size=64", "train.sequence_length=4096", f"cost.peak={peak}")

    def seconds(*precision: str) -> dict[str, float]:
        found = steps("llama-3.1-8b", *given, *precision).slowest.roofs
        return {name: roof.compute_seconds for name, roof in found.items()}

    peaks = {dtype: figure.value for dtype, figure in H800.peaks.items()}
    forward = compute.forward(Spec.load("llama-3.1-8b"), context=4096)
    tokens = 3 * 64 * 4096
    half, narrow = seconds("precision.kind=bf16"), seconds("precision.kind=fp8-block")
    wide = seconds("precision.kind=full", "precision.dtype=float32")
    for name, found in half.items():
        assert found == wide[name] == pytest.approx(tokens * forward[name].total / peaks["bfloat16"])
    attention = forward["mixer gqa"]
    assert narrow["mixer gqa"] == pytest.approx(
        tokens * (attention.linear / peaks["float8_e4m3fn"] + attention.core / peaks["bfloat16"])
    )
    # What states no precision is computed at the peak that it names.
    assert seconds()["mixer gqa"] == pytest.approx(tokens * attention.total / peaks[peak])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["cost.gpus=3"], "train.batch_size = 8: must be a multiple of the replicas (3)"),
        (["train.micro_batches=3"], "train.micro_batches = 3: must divide the sequences of a replica (8)"),
        (
            ["train.sequence_length=1024"],
            "train.sequence_length = 1024: must be <= max_position_embeddings (512)",
        ),
    ],
)
def test_steps_that_can_not_be_shared_out_are_one_clear_error(changes: list[str], told: str) -> None:
    with pytest.raises(InputError) as refused:
        _ = steps("tiny-llama", *changes).slowest
    assert told in str(refused.value)


def test_experts_on_several_devices_need_what_moves_tokens_between_them() -> None:
    """Sending nothing would be told as no bytes."""
    spec = Spec.load("tiny-moe", ["parallel.expert=2", "train.batch_size=2", "comm.kind=local"])
    told = "comm.kind = local: moves tokens within one process, and parallel.expert is 2; several need collective"
    with pytest.raises(InputError, match=told):
        Traffic(spec, layout(spec), H800, 0)


def test_hardware_without_a_cluster_profile_has_links_of_its_own_numbers() -> None:
    found = of_hardware(load("mi300x"))
    assert found.ranks_per_node == 8
    assert found.links["intra"].bandwidth.value == 4.48e11
    assert found.links["inter"].bandwidth.value == 5e10
    spec = Spec.load("tiny-llama", ["cost.gpus=2", "train.batch_size=2"])
    traffic = Traffic(spec, Layout(spec=spec, devices=2), load("mi300x"), 0)
    (sent,) = [each for each in traffic.sent if each.purpose == "gradients"]
    assert sent.seconds == sent.bytes / 4.48e11


def test_bubbles_of_other_schedules_are_told_beside_the_runs_own() -> None:
    changes = ["cost.tokens=1e9", "train.batch_size=8", "train.micro_batches=4"]

    def told(*more: str) -> dict[str, float | None]:
        section = Report(Spec.load("tiny-llama", [*changes, *more])).sections["optimizer step"]
        return {name: each.value for name, each in section.items() if name.startswith("bubble")}

    run = ["parallel.pipeline=2", "cost.gpus=2"]
    one, dual = told(*run), told(*run, "parallel.schedule=dualpipe")
    assert list(one) == ["bubble", "bubble, zero-bubble instead", "bubble, dualpipe instead"]
    assert dual["bubble"] == one["bubble, dualpipe instead"]
    assert one["bubble"] == dual["bubble, 1f1b instead"]
    # An odd number of stages is no pipeline of both directions.
    assert list(told("parallel.pipeline=3", "cost.gpus=3")) == ["bubble", "bubble, zero-bubble instead"]
    assert told("cost.gpus=1") == {}
