"""How long an optimizer step takes at least: a roofline by component, communication, a pipeline's bubble.

A component computes at the peak of the dtype that its maps are multiplied in (wider ones at that of bfloat16: a bound
that plain float32 does not reach), or as fast as what it reads and writes passes through memory, whichever is slower; a
training step is three forward passes. A pipeline of P stages idles for

    1F1B                   (P - 1) (F + B)
    zero-bubble (ZB1P)     (P - 1) (F + B - 2 W)
    DualPipe               (P / 2 - 1) (F&B + B - 3 W)

where F and B are a micro-batch's forward and backward pass, W the part of B that is for weights, F&B both at once
(arXiv 2412.19437, table 2); here B = 2 F, W = F and F&B = 3 F.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property

import attrs

from composeformer.contracts import Core, Uses
from composeformer.costs.counts import UNSTATED, activation_bytes, component, stated
from composeformer.costs.hardware import Hardware
from composeformer.costs.layout import Layout
from composeformer.costs.traffic import Traffic, links
from composeformer.errors import InputError
from composeformer.formats import BITS
from composeformer.plan import Node
from composeformer.spec import Spec

# Dtypes that are as fast as another, or no faster: matrix units take float32 in parts of 16 bits, at the best.
SPEED = {"float8_e5m2": "float8_e4m3fn", "float32": "bfloat16", "float64": "bfloat16"}


@attrs.frozen(kw_only=True)
class Roof:
    """One component of a stage in one step of one device: operations, bytes through memory, and the seconds of each."""

    operations: float
    bytes: float
    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> str:
        """What bounds it."""
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"

    def __add__(self, other: "Roof") -> "Roof":
        return Roof(
            operations=self.operations + other.operations,
            bytes=self.bytes + other.bytes,
            compute_seconds=self.compute_seconds + other.compute_seconds,
            memory_seconds=self.memory_seconds + other.memory_seconds,
        )


@attrs.frozen(kw_only=True)
class Step:
    """Seconds of a step of the slowest stage. `hidden` has all communication behind computation, `exposed` none."""

    stage: int
    roofs: Mapping[str, Roof]
    bubble: float
    traffic: Traffic

    @property
    def compute(self) -> float:
        return sum(roof.seconds for roof in self.roofs.values())

    @property
    def hidden(self) -> float:
        return max(self.compute, self.traffic.seconds) + self.bubble

    @property
    def exposed(self) -> float:
        return self.compute + self.traffic.seconds + self.bubble


def bubble(schedule: str, stages: int, micro_batches: int, compute: float) -> float:
    """Seconds that a device idles in a step whose `compute` seconds are those of all micro-batches."""
    forward = compute / micro_batches / 3
    if stages == 1:
        return 0.0
    if schedule == "1f1b":
        return (stages - 1) * 3 * forward
    if schedule == "zero-bubble":
        return (stages - 1) * forward
    return (stages / 2 - 1) * 2 * forward


class Steps:
    """The step of a spec's run: `[train]` says its tokens, `[parallel]` its layout, `[cost]` its hardware."""

    def __init__(self, spec: Spec, placed: Layout, hardware: Hardware) -> None:
        self.spec, self.placed, self.hardware = spec, placed, hardware
        self.cluster = links(hardware)
        train, length = spec.train, spec.model.max_position_embeddings
        if train.sequence_length > length:
            told = f"must be <= max_position_embeddings ({length})"
            raise InputError(f"train.sequence_length = {train.sequence_length}: {told}")
        if placed.data and train.batch_size // placed.data % train.micro_batches:
            told = f"must divide the sequences of a replica ({train.batch_size // placed.data})"
            raise InputError(f"train.micro_batches = {train.micro_batches}: {told}")

    @cached_property
    def slowest(self) -> Step:
        """Of the stage that takes longest."""
        steps = [self._stage(stage) for stage in range(self.placed.pipeline)]
        return max(steps, key=lambda step: step.exposed)

    def _stage(self, stage: int) -> Step:
        traffic = Traffic(self.spec, self.placed, self.hardware, stage, self.cluster)
        roofs: dict[str, Roof] = {}
        for node, times in self._computed(stage):
            roof = self._roof(node, times * traffic.tokens)
            if roof.operations:
                name = component(node)
                roofs[name] = roofs[name] + roof if name in roofs else roof
        train = self.spec.train
        compute = sum(roof.seconds for roof in roofs.values())
        idle = bubble(self.spec.parallel.schedule, self.placed.pipeline, train.micro_batches, compute)
        return Step(stage=stage, roofs=roofs, bubble=idle, traffic=traffic)

    def _computed(self, stage: int) -> Iterator[tuple[Node, int]]:
        """The parts of a stage, and how often each of its tokens passes through: a predictor runs the ends again."""
        plan = self.spec.plan
        ends = {"embedding": plan.embedding, "head": plan.head}
        for top in self.placed.stages[stage]:
            for node in top.walk():
                yield node, 1
                for use in stated(node, "train"):
                    if isinstance(use, Uses):
                        yield from ((below, use.times) for below in ends[use.slot].walk())

    def _roof(self, node: Node, tokens: int) -> Roof:
        """Three forward passes: in each micro-batch a map reads its weights and its rows, and writes its results."""
        formats, width, known = self.spec.formats, activation_bytes(self.spec), self._is_stated
        passes = 3 * self.spec.train.micro_batches
        operations = moved = seconds = 0.0
        for linear in node.linears.values():
            form = formats.at(f"{node.path}.{linear.weight.name}")
            # Devices that share maps share out a token's features, or the tokens themselves before experts.
            shared = 1 if linear.shard is None else self.placed.tensor
            work = 3.0 * tokens * linear.flops / shared
            operations += work
            seconds += work / self._peak(form.compute)
            spread = self.placed.expert if linear.shard == "group" else shared
            size = BITS[form.compute] / 8 if known else UNSTATED
            moved += passes * linear.weight.elements / spread * size
            moved += 3 * tokens * (linear.inputs + linear.outputs) * linear.active_groups * width / shared
        for core in (c for c in stated(node, "train") if isinstance(c, Core)):
            work = 3.0 * tokens * core.flops(self.spec.train.sequence_length, True) / self.placed.tensor
            operations += work
            seconds += work / self._peak(formats.activations)
        return Roof(
            operations=operations,
            bytes=moved,
            compute_seconds=seconds,
            memory_seconds=moved / self.hardware.bandwidth.value,
        )

    @property
    def _is_stated(self) -> bool:
        """Whether the spec says in which dtypes it is computed."""
        return "precision" in self.spec.document.data

    def _peak(self, dtype: str) -> float:
        """The peak of what is multiplied in a dtype; that of `cost.peak` where the spec states no precision, or the
        hardware names no peak of it.
        """
        named = SPEED.get(dtype, dtype) if self._is_stated else self.spec.cost.peak
        peaks = self.hardware.peaks
        return peaks[named].value if named in peaks else self.hardware.peak(self.spec.cost.peak).value
