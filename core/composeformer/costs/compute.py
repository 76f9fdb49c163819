"""Floating-point operations by component, and what decoding reads for them, as functions of the context.

Operations are those of one token, two for a multiply and an add, matrix products only. In training and prefill a token
of a sequence of S sees S / 2 others on the mean, or S under a full mask; in decoding it sees all S that are cached. A
router's map is told apart: the published convention leaves it out.

Bytes are as the precision policy says, or two an element where a spec states none.

Decoding a token reads every weight that it passes through and everything that is cached; a batch of B sequences reads
weights once, of experts those that any of B tokens chose, on the mean under even routing. The ratio of operations to
bytes, beside that of a device's peak to its bandwidth, says which of the two bounds it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import attrs

from composeformer.contracts import Cache, Core, Phase, Uses
from composeformer.costs.counts import UNSTATED, activation_bytes, component, stated, unknown
from composeformer.errors import InputError
from composeformer.plan import Node
from composeformer.spec import Spec


@attrs.frozen(kw_only=True)
class Work:
    """Operations of one token in one component: in its linear maps, and between activations."""

    linear: float
    core: float

    @property
    def total(self) -> float:
        return self.linear + self.core

    def __add__(self, other: "Work") -> "Work":
        return Work(linear=self.linear + other.linear, core=self.core + other.core)


NOTHING = Work(linear=0.0, core=0.0)


@attrs.frozen(kw_only=True)
class Decoding:
    """One token of each of `batch` sequences: operations, and bytes of weights and cache that they read together."""

    context: int
    batch: int
    operations: float
    weight_bytes: float
    cache_bytes: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / (self.weight_bytes + self.cache_bytes)


def forward(
    spec: Spec, *, context: int, causal: bool = True, predictor: bool = False, routers: bool = False
) -> dict[str, Work]:
    """Operations of a forward pass for one token, by component; `predictor` adds its own, and what it runs again."""
    return _by_component(
        spec, predictor, lambda node: _work(node, context, causal, "train", routers), context
    )


def decoding(spec: Spec, *, context: int, predictor: bool = False) -> dict[str, Work]:
    """Operations of decoding one token of a sequence of `context` cached ones, by component, routers included;
    `predictor` adds what it drafts after that token.
    """
    return _by_component(spec, predictor, lambda node: _work(node, context, False, "decode", True), context)


def total(found: Mapping[str, Work]) -> float:
    """Operations of all components."""
    return sum(work.total for work in found.values())


def decode(spec: Spec, *, context: int, batch: int = 1) -> Decoding:
    """Decoding one more token of each of `batch` sequences of `context` cached tokens, without a predictor."""
    _positive(context=context, batch=batch)
    weights = cached = 0.0
    width = activation_bytes(spec)
    for node in _nodes(spec, False):
        caches = (each for each in stated(node, "decode") if isinstance(each, Cache))
        cached += width * sum(each.elements(context) for each in caches)
        # A row of the embedding's table is all that a token reads of it.
        weights += 0.0 if node.slot == "embedding" else _read(node, spec, batch)
    return Decoding(
        context=context,
        batch=batch,
        operations=batch * total(decoding(spec, context=context)),
        weight_bytes=weights,
        cache_bytes=batch * cached,
    )


def attention_intensity(spec: Spec) -> dict[str, float]:
    """Operations a byte of what each sort of mixer does with its cache in decoding, for one more cached token."""
    width = activation_bytes(spec)
    found = {}
    for node in _nodes(spec, False):
        costs = stated(node, "decode") if node.slot == "mixer" else []
        bytes_ = width * sum(c.per_token for c in costs if isinstance(c, Cache))
        if bytes_:
            found[component(node)] = sum(c.per_key for c in costs if isinstance(c, Core)) / bytes_
    return found


def _nodes(spec: Spec, predictor: bool) -> Iterable[Node]:
    plan = spec.plan
    own = set(plan.predictor.walk()) if plan.predictor is not None else set()
    return (node for node in plan.nodes() if predictor or node not in own)


def _again(spec: Spec) -> Iterable[tuple[Uses, Node]]:
    """What a predictor runs again, of the model's ends."""
    plan = spec.plan
    ends = {"embedding": plan.embedding, "head": plan.head}
    for node in plan.predictor.walk() if plan.predictor is not None else ():
        for use in stated(node, "train"):
            if isinstance(use, Uses):
                yield from ((use, below) for below in ends[use.slot].walk())


def _by_component(spec: Spec, predictor: bool, work: Callable[[Node], Work], context: int) -> dict[str, Work]:
    """The work of every part, and of what a predictor runs again."""
    _positive(context=context)
    found: dict[str, Work] = defaultdict(lambda: NOTHING)
    for node in _nodes(spec, predictor):
        own = work(node)
        if own.total or node.linears:
            found[component(node)] += own
    for use, node in _again(spec) if predictor else ():
        once = work(node)
        found[component(node)] += Work(linear=use.times * once.linear, core=use.times * once.core)
    return dict(found)


def _work(node: Node, context: int, causal: bool, phase: Phase, routers: bool) -> Work:
    counted = routers or node.slot != "router"
    linear = float(sum(each.flops for each in node.linears.values())) if counted else 0.0
    cores = (c for c in stated(node, phase) if isinstance(c, Core))
    return Work(linear=linear, core=float(sum(c.flops(context, causal) for c in cores)))


def _read(node: Node, spec: Spec, batch: int) -> float:
    """Bytes of a node's own weights that a batch of tokens reads."""
    formats = spec.formats
    own = "precision" in spec.document.data
    bytes_ = 0.0
    shares = {}
    for name, linear in node.linears.items():
        if linear.groups is not None:
            chosen = linear.active_groups / linear.groups
            shares[name] = 1.0 - (1.0 - chosen) ** batch
    for full, weight in node.tensors():
        target = weight.same_as or full
        name = weight.name.rpartition(".")[0]
        size = formats.tensors[target].bits / 8 if own else UNSTATED
        bytes_ += weight.elements * size * shares.get(name, 1.0)
    return bytes_


def _positive(**counts: int) -> None:
    for name, found in counts.items():
        if found < 1:
            raise InputError(f"{name} = {found}: must be >= 1")


__all__ = [
    "Decoding",
    "Work",
    "attention_intensity",
    "component",
    "decode",
    "decoding",
    "forward",
    "total",
    "unknown",
]
