"""Figures that were published of DeepSeek-V3 and of what it is compared with, beside what the tool computes of each."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import attrs

from composeformer.contracts import Exchange
from composeformer.costs import Counts, checkpoint, cost, topology
from composeformer.costs.economics.run import owned_rate
from composeformer.costs.ledger import Ledger, Step
from composeformer.costs.pricing import Pricing
from composeformer.plugins import current
from composeformer.spec import Spec

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = json.loads((ROOT / "tests" / "data" / "published_figures.json").read_text(encoding="utf-8"))
FACTS = {fact["id"]: fact for fact in PUBLISHED["facts"]}
TRILLION = 1e12
# Of arXiv 2505.09343, table 4: one step of 15,360 sequences.
STEP_TOKENS, STEP_SECONDS, DEVICES = 15360 * 4096, 19.926, 2048


@attrs.frozen(kw_only=True)
class Row:
    """A figure: as published, as computed, and how far apart they may be, `tolerance` relative or in `points`."""

    id: str
    what: str
    published: float
    computed: float
    tolerance: float
    unit: str
    how: str
    points: bool = False

    @property
    def deviation(self) -> float:
        """Relative, or in points of one."""
        gap = self.computed - self.published
        return gap if self.points else gap / self.published

    @property
    def reproduced(self) -> bool:
        # One part in 1e12 is the rounding of float64.
        return abs(self.deviation) <= self.tolerance + 1e-12


@cache
def pricing(name: str) -> Pricing:
    return Pricing(Spec.load(name))


@cache
def counts(name: str, context: int = 4096, causal: bool = True) -> Counts:
    return cost(name, context=context, causal=causal)


def rows() -> Iterator[Row]:
    """Every published figure that follows from others, or from a spec."""
    for make in (hours, table_four, links, predictor, second, llama, others, models):
        yield from make()


def row(
    id: str, what: str, published: float, computed: float, tolerance: float, how: str, **more: Any
) -> Row:
    unit = more.pop("unit", FACTS[id]["unit"] if id in FACTS else "")
    return Row(
        id=id,
        what=what,
        published=published,
        computed=computed,
        tolerance=tolerance,
        unit=unit,
        how=how,
        **more,
    )


def value(id: str) -> Any:
    """What was published."""
    return FACTS[id]["value"]


def hours() -> Iterator[Row]:
    stages = [value(f"v3.gpu_hours.{stage}") for stage in ("pretrain", "context", "post")]
    whole = sum(stages)
    yield row(
        "v3.gpu_hours.total",
        "hours of all stages",
        value("v3.gpu_hours.total"),
        whole,
        0.0,
        "the sum of three",
    )
    run = pricing("deepseek-v3")
    rate = run.values["rate"]
    published = value("v3.usd")
    for stage, stage_hours in zip(("pretrain", "context", "post", "total"), (*stages, whole)):
        yield row(
            "v3.usd", f"rent, {stage}", published[stage], stage_hours * rate, 0.0, f"hours at ${rate:g}"
        )
    per_trillion = stages[0] / 14.8
    yield row(
        "v3.hours_per_T", "hours for 1T tokens", value("v3.hours_per_T"), per_trillion, 0.001, "2.664M / 14.8"
    )
    stepped = TRILLION / STEP_TOKENS * STEP_SECONDS * DEVICES / 3600
    yield row(
        "v3.hours_per_T", "the same from a step", value("v3.hours_per_T"), stepped, 0.001, "table 4: 19.926 s"
    )
    days = per_trillion / DEVICES / 24
    yield row("v3.days_per_T", "days for 1T tokens", value("v3.days_per_T"), days, 0.011, "on 2,048 devices")
    yield row(
        "v3.gpu_hours.pretrain",
        "hours of pre-training, predicted",
        stages[0],
        run.run.pretraining_hours,
        0.001,
        "14.8T tokens x 249.81 GFLOP at 38.94% of 989.5 TFLOPS",
    )
    computed = 14.8 * TRILLION * counts("deepseek-v3").flops_per_token.training
    yield row(
        "v3.train_flops.total", "operations", value("v3.train_flops.total"), computed, 0.001, "14.8T tokens"
    )


def table_four() -> Iterator[Row]:
    second = STEP_TOKENS / STEP_SECONDS
    day = value("v3.table4.tokens_per_day")
    yield row(
        "v3.table4.tokens_per_day", "tokens a day", day, second * 86400, 1e-4, "15,360 x 4,096 in 19.926 s"
    )
    peak = pricing("deepseek-v3").peak.value
    for mask, causal in (("causal", True), ("noncausal", False)):
        achieved = counts("deepseek-v3", causal=causal).flops_per_token.training * second / DEVICES
        name = f"{'causal' if causal else 'full mask'}"
        yield row(
            "v3.table4.tflops",
            f"TFLOPS of a device, {name}",
            value("v3.table4.tflops")[mask],
            achieved / 1e12,
            0.002,
            "operations of a token x tokens a second / 2,048",
        )
        yield row(
            "v3.table4.mfu",
            f"utilisation, {name}",
            value("v3.table4.mfu")[mask],
            achieved / peak,
            0.001,
            "of 989.5 TFLOPS, bfloat16, without the predictor",
            points=True,
        )
    parts = value("v3.table4.time_parts")
    whole = sum(seconds for name, seconds in parts.items() if name != "step")
    yield row("v3.table4.time_parts", "a step's parts", parts["step"], whole, 0.002, "their sum")


def exchanged(features: int) -> Ledger:
    """A decoding step of arXiv 2505.09343: 32 tokens to nine experts on nodes of their own, one byte out, two back."""
    registry = current().registry
    config: Any = registry.get("comm", "collective").config
    moved = [Exchange(name=name, elements=features, fan_out=9) for name in ("dispatch", "combine")]
    made = config(dispatch_format="fp8", combine_format="bf16", ranks_per_node=1)
    ledger: Ledger = made.expected(
        moved, tokens=32, groups=320, ranks=320, activation=2, apart=True, backward=False
    ).only("payload")
    return ledger


def links() -> Iterator[Row]:
    layer = topology.load("h800").time(exchanged(7000)).transfer
    token = 61 * 2 * layer
    how = "(1 + 2) bytes x 32 x 9 x 7,000 / 50 GB/s; with the 7,168 features that it has, 123.86 us"
    yield row("v3.a2a.us", "a layer's all-to-alls", value("v3.a2a.us"), layer * 1e6, 0.0, how)
    yield row(
        "v3.tpot_ms", "a token's", value("v3.tpot_ms"), token * 1e3, 2e-4, "61 layers, two micro-batches"
    )
    yield row("v3.tps_limit", "tokens a second", value("v3.tps_limit"), 1 / token, 0.012, "its inverse")
    rack = Ledger()
    for name, bytes_ in (("dispatch", 1), ("combine", 2)):
        step = Step(name, "forward", "ranks")  # type: ignore[arg-type]
        rack.called(step)
        rack.add(step, "payload", "intra", 32 * 9 * 7000 * bytes_, 32 * 9 * 7000 * bytes_)
    layer = topology.load("nvl72").time(rack).transfer
    token = 61 * 2 * layer
    for name, what, computed in (
        ("us", "in one rack, a layer's", layer * 1e6),
        ("tpot_ms", "a token's", token * 1e3),
        ("tps", "tokens a second", 1 / token),
    ):
        yield row("nvl72", what, value("nvl72")[name], computed, 0.02, "the same at 900 GB/s")
    h800 = topology.load("h800").links
    experts = 4 * h800["intra"].bandwidth.value / h800["inter"].bandwidth.value
    yield row(
        "v3.experts_same_cost", "experts for four nodes' bytes", value("v3.experts_same_cost"), round(experts), 0.0,
        "4 nodes x 160 / 50 GB/s = 12.8",
    )  # fmt: skip
    parallel = value("v3.parallel")
    replicas = parallel["gpus"] / parallel["pp"] / parallel["ep"]
    yield row("v3.parallel", "replicas of an expert", parallel["edp"], replicas, 0.0, "2,048 / 16 / 64")


def linear_operations(name: str, predictor: bool) -> float:
    """Forward operations of linear maps of a token, routers left out, with or of the predictor alone with its head."""
    plan = Spec.load(name).plan
    assert plan.predictor is not None
    own = set(plan.predictor.walk())
    nodes = [n for n in plan.nodes() if (n in own) == predictor and n.slot != "router"]
    nodes += [plan.head] if predictor else []
    return float(sum(linear.flops for node in nodes for linear in node.linears.values()))


def predictor() -> Iterator[Row]:
    extra = linear_operations("deepseek-v3", True) / linear_operations("deepseek-v3", False)
    for accepted in (0.85, 0.90):
        yield row(
            "v3.mtp.speedup",
            f"tokens a second with drafts, {accepted:.0%} accepted",
            value("v3.mtp.speedup"),
            (1 + accepted) / (1 + extra),
            0.03,
            f"(1 + p) / (1 + {extra:.4f}), what a draft costs",
        )


def second() -> Iterator[Row]:
    saving = 1 - value("v2.hours_per_T") / 300600
    yield row(
        "v2.hours_per_T",
        "V2 against DeepSeek 67B, hours",
        0.425,
        saving,
        0.001,
        "1 - 172.8K / 300.6K",
        unit="",
    )
    dense = 95 * 2 * 8 * 128 * 2
    cached = counts("deepseek-v2").cache_bytes_per_token
    yield row(
        "v2.kv_reduction", "V2 against DeepSeek 67B, cache", value("v2.kv_reduction"),
        1 - cached * 6 / 16 / dense, 0.001, f"6 bits against 16; at equal widths {1 - cached / dense:.1%}", points=True,
    )  # fmt: skip


def llama() -> Iterator[Row]:
    for devices, length, achieved, published in value("llama3.405b.table4"):
        computed = achieved * 1e12 / pricing("llama-3.1-405b").peak.value
        what = f"Llama 3.1 405B, {devices:,} devices, {length:,} tokens"
        yield row(
            "llama3.405b.table4", what, published, computed, 0.006, f"{achieved} of 989.5 TFLOPS", points=True
        )
    rounded = 6 * 405e9 * 15.6e12
    yield row(
        "llama3.405b.flops",
        "its operations, 6 N D",
        value("llama3.405b.flops"),
        rounded,
        0.003,
        "405B, 15.6T",
    )
    cards = {"405B": (8930, 30.84e6, 700), "70B": (2040, 7.0e6, 700), "8B": (420, 1.46e6, 700)}
    cards |= {"L2-7B": (31.22, 184320, 400), "L2-70B": (291.42, 1720320, 400)}
    for name, published in value("energy.llama"):
        tonnes, device_hours, watts = cards[name]
        computed = tonnes * 1e3 / (device_hours * watts / 1e3)
        yield row(
            "energy.llama", f"carbon of Llama {name}", published, computed, 0.015, f"{tonnes} t / (h x {watts} W)",
            unit="kg/kWh",
        )  # fmt: skip
    ours, theirs = pricing("deepseek-v3"), pricing("llama-3.1-405b")
    for name, published, computed in (
        ("device hours", 30.84 / 2.664, theirs.run.pretraining_hours / ours.run.pretraining_hours),
        ("operations of a token", 10.10, theirs.per_token / ours.per_token),
        ("tokens", 1.054, theirs.tokens / ours.tokens),
        ("utilisation", 1.087, ours.utilisation.causal / theirs.utilisation.causal),
    ):
        how = "Llama at its 8,192 tokens, V3 at 4,096"
        yield row("ratio.llama_v3", f"Llama 405B over V3: {name}", published, computed, 0.002, how, unit="x")


def others() -> Iterator[Row]:
    yield row("r1.hours", "R1's hours", value("r1.hours"), 294000 / 2, 0.0, "$294K at $2")
    network = value("network.mpft")
    per = network["cost_musd"] * 1e3 / network["endpoints"]
    yield row(
        "network.mpft",
        "an endpoint of the network",
        network["per_endpoint_kusd"],
        per,
        0.01,
        "72M / 16,384",
        unit="k$",
    )
    share = value("v3.ablations_disclosed") / pricing("deepseek-v3").run.operations
    yield row(
        "v3.ablations_disclosed",
        "ablations over the run",
        0.205,
        share,
        0.005,
        "six disclosed pairs",
        unit="",
    )
    run = pricing("deepseek-v3")
    for price, published in PUBLISHED["cost_model"]["epoch_rate_at_price"].items():
        computed = owned_rate({**run.values, "gpu_price": float(price)}, run.hardware.power.value)
        yield row(
            "epoch.rate", f"an owned hour of a ${int(price):,} device", published, computed, 0.001, "arXiv 2405.21015",
            unit="$/h",
        )  # fmt: skip


def models() -> Iterator[Row]:
    found = counts("deepseek-v3")
    folder = checkpoint(Spec.load("deepseek-v3", ["precision.weights=float8_e4m3fn"]))
    told = (
        ("parameters", 671026404352, found.total, 0.0),
        ("of the predictor", 11610067968, found.predictor, 0.0),
        ("of the predictor, as stored", 13463426048, found.predictor + folder.copies, 0.0),
        ("active, with both embeddings", 37552282624, found.active.with_embeddings, 0.0),
        ("active, without the input embedding", 36625603584, found.active.without_input_embedding, 0.0),
        ("active, without embeddings", 35698924544, found.active.without_embeddings, 0.0),
        ("elements of the FP8 checkpoint", 684531386000, folder.elements, 0.0),
        ("its bytes", 688574839360, folder.bytes, 0.0),
        ("bytes of cache a token", 70272, found.cache_bytes_per_token, 0.0),
        ("training operations of a token, G", 250, found.flops_per_token.training / 1e9, 0.001),
        ("V2's", 155, counts("deepseek-v2").flops_per_token.training / 1e9, 0.001),
    )
    for what, published, computed, tolerance in told:
        yield row("v3.model", what, published, computed, tolerance, "from the spec")


NOT_TO_BE_MATCHED = (
    ("Qwen-72B, dense, training operations of a token", 394.0, "qwen2.5-72b"),
    ("LLaMA-405B, dense, training operations of a token", 2448.0, "llama-3.1-405b"),
)
# Read, and entering what is computed; nothing here predicts them.
INPUTS = (
    "v3.gpu_hours.context",
    "v3.gpu_hours.post",
    "v3.pretrain_days",
    "v3.mtp.acceptance",
    "v3.mtp.lambda",
    "v3.gamma",
    "v3.alpha",
    "v3.node_limit",
    "v3.comm_sms",
    "v3.fp8.loss_error",
    "v3.lr",
    "v3.batch",
    "v3.authors",
    "llama3.405b.whole_run_mfu",
)
