"""What one device sends in an optimizer step, by what for and over which links, and how long that takes alone.

Experts are told by the communication component, for even routing. The rest is told by what rings of R devices send: an
all-reduce 2 (R - 1) / R of its bytes, a reduce-scatter or an all-gather half of that. A ring that spans nodes sends all
of it over the links between them, somewhere; the device there is the one that is told.

    gradients    reduced over replicas, once a step; with ZeRO the updated weights are gathered after it
    copies       gradients of what several stages hold (a tied embedding, that of a predictor), summed over them
    weights      gathered for each forward and backward pass, where replicas share them (ZeRO-3)
    activations  summed over the devices that share a linear map, twice a sublayer in each direction; gathered from
                 those among which tokens were shared out before experts
    stages       the residual stream, and its gradient back, for each token
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import attrs

from composeformer.contracts import Exchange
from composeformer.costs import topology
from composeformer.costs.counts import activation_bytes, stated
from composeformer.costs.figures import Figure
from composeformer.costs.hardware import Hardware
from composeformer.costs.layout import Layout
from composeformer.costs.ledger import Ledger, Link, several
from composeformer.costs.topology import Connection, Topology
from composeformer.errors import InputError, one_of
from composeformer.formats import BITS
from composeformer.plan import Node
from composeformer.spec import Spec

Purpose = Literal["experts", "gradients", "copies", "weights", "activations", "stages"]


@attrs.frozen(kw_only=True)
class Sent:
    """Bytes that a device sends in a step for a purpose over a class of links, and the seconds they take alone."""

    purpose: Purpose
    link: Link
    bytes: float
    seconds: float


class Traffic:
    """Of the devices of one stage, on the links of `cluster`, by default those of the hardware. Raises InputError where
    tokens can not be shared out, or experts not exchanged.
    """

    def __init__(
        self, spec: Spec, placed: Layout, hardware: Hardware, stage: int, cluster: Topology | None = None
    ) -> None:
        self.spec, self.placed, self.stage = spec, placed, stage
        self.cluster = links(hardware) if cluster is None else cluster
        train = spec.train
        if train.batch_size % placed.data:
            told = f"must be a multiple of the replicas ({placed.data}): devices with tokens of their own"
            raise InputError(f"train.batch_size = {train.batch_size}: {told}")
        cut = any(linear.shard == "group" for linear in spec.plan.linears.values())
        comm = spec.single("comm")
        if placed.expert > 1 and cut and not several(comm.config):
            registry = spec.registry
            able = [kind for kind in registry.kinds("comm") if several(registry.get("comm", kind).config)]
            told = f"moves tokens within one process, and parallel.expert is {placed.expert}"
            raise InputError(f"comm.kind = {comm.kind}: {told}; several need {one_of(able)}")

    @property
    def tokens(self) -> int:
        """Of one device in one step."""
        return self.spec.train.batch_size // self.placed.data * self.spec.train.sequence_length

    @cached_property
    def sent(self) -> tuple[Sent, ...]:
        """Everything, by purpose and link; what is nothing is left out."""
        found = [*self._experts(), *self._reduced(), *self._copies(), *self._activations(), *self._stages()]
        return tuple(each for each in found if each.bytes)

    @property
    def seconds(self) -> float:
        """If nothing of it happens at once, and nothing behind computation."""
        return sum(each.seconds for each in self.sent)

    def _link(self, spread: int) -> Link:
        """The class that a ring over so many neighbouring devices has its slowest link in."""
        return "intra" if spread <= self.cluster.ranks_per_node else "inter"

    def _ring(self, purpose: Purpose, moved: float, spread: int) -> Sent:
        link = self._link(spread)
        return Sent(
            purpose=purpose, link=link, bytes=moved, seconds=moved / self.cluster.links[link].bandwidth.value
        )

    def _nodes(self) -> Iterator[Node]:
        for top in self.placed.stages[self.stage]:
            yield from top.walk()

    def _experts(self) -> Iterator[Sent]:
        if self.placed.expert == 1:
            return
        config: Any = self.spec.single("comm").config
        # Most layers are alike, and what a backend expects of one takes time.
        alike: Counter[tuple[tuple[Exchange, ...], int, int | None]] = Counter()
        for node in self._nodes():
            moved = tuple(cost for cost in stated(node, "train") if isinstance(cost, Exchange))
            groups = {linear.groups for linear in node.linears.values() if linear.shard == "group"}
            if moved and groups:
                alike[moved, groups.pop() or 1, self._limit(node)] += 1
        found: list[tuple[Ledger, int]] = []
        for (moved, experts, limit), layers in alike.items():
            ledger: Ledger = config.expected(
                moved,
                # Of devices that share maps, each sends a part of their tokens.
                tokens=-(-self.tokens // self.placed.tensor),
                groups=experts,
                ranks=self.placed.expert,
                activation=activation_bytes(self.spec),
                nodes=limit,
            )
            found.append((ledger, layers))
        classes: tuple[Link, ...] = ("intra", "inter")
        for link in classes:
            moved_bytes = float(sum(layers * ledger.volume(link=link).sent for ledger, layers in found))
            yield Sent(
                purpose="experts",
                link=link,
                bytes=moved_bytes,
                seconds=moved_bytes / self.cluster.links[link].bandwidth.value,
            )

    def _limit(self, node: Node) -> int | None:
        """Nodes that a token may visit, where a router's groups of experts are the experts of nodes."""
        size = getattr(self.spec.single("comm").config, "ranks_per_node", None)
        for child in node.children.values():
            groups = getattr(child.part.config, "num_groups", 1)
            if size and groups > 1 and groups == self.placed.expert // size:
                limit: int = child.part.config.top_k_groups
                return limit
        return None

    def _reduced(self) -> Iterator[Sent]:
        """Gradients, and weights that are shared, in rings of replicas; those of experts are farther apart."""
        formats, zero = self.spec.formats.tensors, self.placed.zero
        passes = 2 * self.spec.train.micro_batches
        by_ring: dict[int, list[float]] = {}
        for held in self.placed.held(self.stage):
            form = formats[held.name]
            if held.weight.trains and held.replicas > 1 and form.codec is None:
                both = by_ring.setdefault(held.replicas, [0.0, 0.0])
                share = held.elements * (held.replicas - 1) / held.replicas
                both[0] += share * BITS[form.gradient] / 8
                both[1] += share * BITS[form.gather] / 8
        for _, (gradients, weights) in by_ring.items():
            # Replicas of experts are spread over the whole stage, as all others are.
            spread = self.placed.stage_devices
            yield self._ring("gradients", gradients * (2 if zero == 0 else 1), spread)
            yield self._ring("weights", weights * (0, 1, 1, passes)[zero], spread)

    def _copies(self) -> Iterator[Sent]:
        """Once a step: whole gradients, or where replicas share the optimizer's state, what each has of them."""
        moved = 0.0
        for held in self.placed.held(self.stage):
            form, stages = self.spec.formats.tensors[held.name], self.placed.holders[held.name]
            if held.weight.trains and form.codec is None:
                own = held.elements / (held.replicas if self.placed.zero else 1)
                moved += 2 * (stages - 1) / stages * own * BITS[form.gradient] / 8
        yield self._ring("copies", moved, self.placed.devices)

    def _activations(self) -> Iterator[Sent]:
        tensor = self.placed.tensor
        if tensor == 1:
            return
        size = self.tokens * activation_bytes(self.spec) * 2 * (tensor - 1) / tensor
        moved = 0.0
        for node in self._nodes():
            # Outputs of maps cut along their inputs are summed; in the backward pass the gradients of their inputs.
            moved += sum(
                2 * size * linear.outputs for linear in node.linears.values() if linear.shard == "in"
            )
            # Each has the experts' results of its part of the tokens: they are gathered, and so are gradients.
            widths = {linear.inputs for linear in node.linears.values() if linear.shard == "group"}
            moved += size * node.site.width if node.site.width in widths else 0.0
        yield self._ring("activations", moved, tensor)

    def _stages(self) -> Iterator[Sent]:
        if self.placed.pipeline == 1:
            return
        size = self.tokens * self.spec.model.hidden_size * activation_bytes(self.spec)
        ends = (self.stage > 0) + (self.stage < self.placed.pipeline - 1)
        yield self._ring("stages", ends * size, 2 * self.placed.stage_devices)


def links(hardware: Hardware) -> Topology:
    """The profile of the hardware's name where a topology of it is shipped, else the hardware's own numbers."""
    name = hardware.name
    return topology.load(name) if name in topology.shipped() else of_hardware(hardware)


def of_hardware(hardware: Hardware) -> Topology:
    """Nodes of a device's own numbers; nothing is known of latency."""
    nothing = Figure(value=0.0, source="unknown, taken as none")
    # A copy to oneself reads and writes.
    own = attrs.evolve(hardware.bandwidth, value=hardware.bandwidth.value / 2)
    figures: dict[Link, Figure] = {"self": own, "intra": hardware.link, "inter": hardware.network}
    return Topology(
        name=hardware.name,
        ranks_per_node=int(hardware.node.value),
        links={link: Connection(bandwidth=figure, latency=nothing) for link, figure in figures.items()},
    )
