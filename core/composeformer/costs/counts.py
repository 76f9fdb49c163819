"""Counts read off the plan: parameters, buffers, cache and floating-point operations, exactly.

Definitions, which every printed number follows:
- `total`: elements of all parameters; a tied matrix once, buffers and the predictor apart.
- `active`: the parameters one token passes through, in the three conventions found in the wild; a tied
  matrix is the head's product, so only the last convention leaves it out.
- `cache`: in the precision policy's dtype of activations, two bytes an element where a spec states no policy; per
  token before any window is full, and of one sequence at the context.
- `flops`: two per multiply-add, matrix products only; a router's, like a norm's, are left out, and so is
  the look-up of embeddings. Attention sees half of the square when causal. Training is three forwards.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import attrs

from composeformer.blame import blame, described
from composeformer.config import Config
from composeformer.contracts import SUBLAYERS, Cache, Core, Cost, Phase, Uses
from composeformer.errors import InputError, PluginError, one_of
from composeformer.formats import BITS
from composeformer.plan import Node
from composeformer.spec import Spec

DEFAULT_CONTEXT = 4096
UNSTATED = 2  # bytes of an element where no precision is stated
SIZES = {1: "one byte", 2: "two bytes", 4: "four bytes", 8: "eight bytes"}


@attrs.frozen(kw_only=True)
class Active:
    """Parameters that one token passes through, by what is counted with them."""

    with_embeddings: int
    without_input_embedding: int
    without_embeddings: int


@attrs.frozen(kw_only=True)
class Flops:
    """Floating-point operations for one token of a sequence of `context` tokens."""

    context: int
    forward: float
    training: float
    training_with_predictor: float
    convention: str


@attrs.frozen(kw_only=True)
class Counts:
    """What a spec is and needs, in elements, bytes and operations; caches in elements of the size `cached_as`.
    `unknown` are components that do not say what they compute and cache: it is in none of these.
    """

    name: str
    fingerprint: str
    total: int
    by_slot: Mapping[str, int]
    predictor: int
    active: Active
    buffers: Mapping[str, int]
    cache_bytes_per_token: int
    cache_bytes_at_context: int
    cached_as: str
    flops_per_token: Flops
    unverified: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def caches_unknown(self) -> bool:
        """Whether a mixer does not say what it caches."""
        return any(name.startswith("mixer ") for name in self.unknown)

    def to_dict(self) -> dict[str, object]:
        """The document that `--json` prints; where mixers do not say what they cache, that is null."""
        silent = self.caches_unknown
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "parameters": {
                "total": self.total,
                "by_slot": dict(self.by_slot),
                "predictor": self.predictor,
                "active": attrs.asdict(self.active),
            },
            "buffers": dict(self.buffers),
            "cache_bytes_per_token": None if silent else self.cache_bytes_per_token,
            "cache_bytes_at_context": None if silent else self.cache_bytes_at_context,
            "flops_per_token": attrs.asdict(self.flops_per_token),
            "unverified": list(self.unverified),
            "unknown": list(self.unknown),
        }


def cost(spec: "Spec | str", *, context: int | None = None, causal: bool = True) -> Counts:
    """The counts of a spec, its path or its shipped name, at a context length (4096, or the model's longest).

    Raises ComposeError for a spec that is none, or a context below 1.
    """
    spec = Spec.load(spec)
    plan = spec.plan
    if context is not None and context < 1:
        raise InputError(f"context = {context}: must be >= 1")
    length = min(DEFAULT_CONTEXT, spec.model.max_position_embeddings) if context is None else context
    predictor = set(plan.predictor.walk()) if plan.predictor is not None else set()
    main = [node for node in plan.nodes() if node not in predictor]
    by_slot: Counter[str] = Counter()
    for node in main:
        by_slot[node.slot] += parameters(node)
    active = sum(active_parameters(node) for node in main)
    embedding = sum(parameters(node) for node in plan.embedding.walk())
    head = sum(parameters(node) for node in plan.head.walk())
    tied = any(name in plan.aliases for node in plan.head.walk() for name, _ in node.tensors())
    silent, width = unknown(spec), activation_bytes(spec)
    convention = ("causal" if causal else "full mask") + ", GEMMs only"
    forward = sum(flops(node, length, causal) for node in main)
    ends = {"embedding": plan.embedding, "head": plan.head}
    again = [use for node in predictor for use in stated(node, "train") if isinstance(use, Uses)]
    extra = sum(flops(node, length, causal) for node in predictor) + sum(
        use.times * flops(node, length, causal) for use in again for node in ends[use.slot].walk()
    )
    return Counts(
        name=spec.name,
        fingerprint=spec.fingerprint,
        total=sum(by_slot.values()),
        by_slot={slot: count for slot, count in by_slot.items() if count},
        predictor=sum(parameters(node) for node in predictor),
        active=Active(
            with_embeddings=active,
            without_input_embedding=active if tied else active - embedding,
            without_embeddings=active - embedding - head,
        ),
        buffers=_buffers(main),
        cache_bytes_per_token=width * sum(cached(node) for node in main),
        cache_bytes_at_context=width * sum(held(node, length) for node in main),
        cached_as=f"{SIZES[width]} an element",
        flops_per_token=Flops(
            context=length,
            forward=forward,
            training=3 * forward,
            training_with_predictor=3 * (forward + extra),
            convention=f"{convention}, without what {one_of(silent)} computes" if silent else convention,
        ),
        unverified=spec.unverified,
        unknown=silent,
    )


def activation_bytes(spec: Spec) -> int:
    """Bytes of an element of the residual stream, and of caches."""
    return BITS[spec.formats.activations] // 8 if "precision" in spec.document.data else UNSTATED


def component(node: Node) -> str:
    """What a node is told as: its slot and kind."""
    return f"{node.slot} {node.part.kind}"


def unknown(spec: Spec) -> tuple[str, ...]:
    """Components whose costs nobody states: sublayers that say nothing of products, caches or anything else."""
    silent = {
        component(node)
        for node in spec.plan.nodes()
        if node.slot in SUBLAYERS and type(node.part.config).cost is Config.cost
    }
    return tuple(sorted(silent))


def parameters(node: Node) -> int:
    """Elements of a part's own parameters; what it shares is counted with its owner."""
    return sum(weight.elements for _, weight in node.tensors() if weight.trains and weight.same_as is None)


def active_parameters(node: Node) -> int:
    """Of those, what one token passes through."""
    idle = sum(
        (linear.groups - linear.active_groups) * (weight.elements // linear.groups)
        for linear in node.linears.values()
        if linear.groups is not None
        for weight in linear.weights
        if weight.same_as is None
    )
    return parameters(node) - idle


def flops(node: Node, context: int, causal: bool, phase: Phase = "train") -> float:
    """Forward operations of a part alone, for one token."""
    products = 0 if node.slot == "router" else sum(linear.flops for linear in node.linears.values())
    costs = stated(node, phase)
    cores = sum(c.flops(context, causal) for c in costs if isinstance(c, Core))
    return products + cores


def cached(node: Node) -> int:
    """Cache elements that one more token adds, before any window is full."""
    return sum(c.per_token for c in stated(node, "decode") if isinstance(c, Cache))


def held(node: Node, context: int) -> int:
    """Cache elements for one sequence of `context` tokens; windows hold no more than their width."""
    return sum(c.elements(context) for c in stated(node, "decode") if isinstance(c, Cache))


def stated(node: Node, phase: Phase) -> Sequence[Cost]:
    """What a part's config says that tensors can not. Raises PluginError where it fails or says something else."""
    if phase not in node.stated_costs:
        node.stated_costs[phase] = _asked(node, phase)
    return node.stated_costs[phase]


def _asked(node: Node, phase: Phase) -> Sequence[Cost]:
    registry = node.site.spec.registry
    with blame(registry, node.part, node.path, "cost"):
        costs = list(node.part.config.cost(node.site, phase))
    for each in costs:
        if not isinstance(each, Cost):
            told = described(registry, node.part, node.path)
            raise PluginError(
                f"{told}: cost yields a {type(each).__name__}, no Core, Cache, Exchange, Saved or Uses"
            )
    return costs


def _buffers(nodes: Iterable[Node]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for node in nodes:
        for weight in node.weights.values():
            if not weight.trains:
                counts[f"{node.slot}_{weight.name}"] += weight.elements
    return dict(counts)
