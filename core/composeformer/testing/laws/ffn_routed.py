"""Laws of feed-forward networks with a router: the output is what the routing says, whatever it says.

The law routes in the router's place: y(i, w) with no choice (every index the number of experts) is the base, the part
that is not routed; that of expert i is y(i, 1) - base.

Shapes: B rows, T tokens, D features, K experts a token, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from composeformer.config import facts_of
from composeformer.decoder import Model
from composeformer.plan import Node
from composeformer.tensors import Routing
from composeformer.testing.bounds import SAFETY, gap, roundoff, size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.ffn import LONGEST, MOST, settled, told, transform
from composeformer.testing.subject import Subject
from composeformer.testing.told import shuffled
from composeformer.testing.twins import twin
from composeformer.train.after import Run

FACTOR = "routed_scaling_factor"


def has_router(subject: Subject) -> str | None:
    """Why a law of routed parts says nothing."""
    slots = {fact.slot for fact in facts_of(subject.component.config).values()}
    return None if "router" in slots else "it has no router"


def router_of(case: Case) -> Node:
    """The router's place."""
    found = next((each for each in case.node.children.values() if each.slot == "router"), None)
    if found is None:
        case.draw.reject("this one has no router")
    return found


@contextmanager
def routed(case: Case, model: Model, route: Callable[..., Routing]) -> Iterator[None]:
    """The router's answers are those of `route`."""
    router = model.get_submodule(router_of(case).path)
    kept = router.__dict__.get("forward")
    router.__dict__["forward"] = route
    try:
        yield
    finally:
        router.__dict__.pop("forward")
        if kept is not None:
            router.__dict__["forward"] = kept


def by(case: Case, x: Tensor, ids: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The output (B, T, D) for a routing (B, T, K)."""
    with routed(case, case.model, lambda *_, **__: Routing(indices, weights)):
        return transform(case, case.model, x, ids).hidden


@law(
    "ffn",
    "routed-sum",
    "the routed part is the sum of the chosen experts' outputs times their weights, each given its gradient",
    kills="weights-enter-the-experts",
    applies=has_router,
)
def routed_sum(case: Case) -> None:
    """For any load: all to a few, the rest idle; a choice of none adds nothing, whatever it weighs."""
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    experts = router_of(case).site.sizes["num_experts"]
    top_k: int = router_of(case).part.config.top_k
    used = case.integer("used", min(top_k, experts), experts)
    seeds = torch.Generator().manual_seed(case.integer("routing", 0, 2**16))
    among = torch.randperm(experts, generator=seeds)[:used]
    order = torch.stack([torch.randperm(used, generator=seeds)[:top_k] for _ in range(rows * tokens)])
    indices = among[order].view(rows, tokens, top_k)
    nobody = torch.rand(indices.shape, generator=seeds) < case.choice("nobody", [0.0, 0.3])
    chosen = indices.masked_fill(nobody, experts)
    weights = case.normal(
        "weights", rows, tokens, top_k, dtype=torch.promote_types(case.dtype, torch.float32)
    )
    x, ids = settled(case, rows, tokens)
    with torch.no_grad():
        base = by(case, x, ids, torch.full_like(indices, experts), torch.full_like(weights, torch.nan))
        ones = torch.ones_like(weights[..., :1])
        each = torch.stack([by(case, x, ids, chosen[..., k : k + 1], ones) for k in range(top_k)], 2).double()
    parts = each - base.double()[:, :, None]
    wanted = base.double() + (weights.double()[..., None] * parts).sum(2)
    leaf = weights.masked_fill(nobody, torch.nan).requires_grad_()
    found = by(case, x, ids, chosen, leaf)
    # Every one of the passes rounds to its own size, and the differences are taken of rounded ones.
    scale = (1 + float(weights.abs().sum(-1).max())) * max(size(base), size(each), size(wanted))
    case.close(found, wanted, "the weighted sum", terms=top_k, scale=scale)
    cotangent = case.stream("cotangent", rows, tokens)
    if not found.requires_grad:
        case.require(bool(nobody.all()), "no gradient reaches the weights")
        return
    torch.autograd.backward(found, cotangent)
    assert leaf.grad is not None
    slopes = (parts * cotangent.double()[:, :, None]).sum(-1).masked_fill(nobody, 0)
    largest = float(cotangent.abs().sum(-1).max()) * max(size(base), size(each))
    case.close(leaf.grad, slopes, "the gradient of the weights", terms=x.shape[-1], scale=largest)


@law(
    "ffn",
    "idle-experts",
    "experts that nobody chose have gradients of exactly zero",
    kills="garbage-for-idle-experts",
    applies=has_router,
)
def idle_experts(case: Case) -> None:
    tokens = case.integer("tokens", 1, 3)
    experts = router_of(case).site.sizes["num_experts"]
    one = case.integer("one", 0, experts)
    x, ids, cotangent = case.stream("x", 1, tokens), case.ids("ids", 1, tokens), case.stream("c", 1, tokens)
    indices = torch.full((1, tokens, 1), one)
    weights = torch.ones(indices.shape, dtype=torch.promote_types(case.dtype, torch.float32))
    with routed(case, case.model, lambda *_, **__: Routing(indices, weights)):
        found = told(case, x, ids, cotangent).gradients
    for name, linear in case.node.linears.items():
        gradient = found.get(f"{case.node.path}.{name}.weight")
        if linear.groups == experts and gradient is not None:
            idle = torch.arange(experts) != one
            case.require(
                not bool(gradient[idle].any()), f"{name}: idle experts have gradients that are not zero"
            )
            if one < experts:
                case.finite(gradient[one], f"{name}: the gradient of the busy expert")


@law(
    "ffn",
    "scaling-factor",
    "the routed part is linear in the router's routed_scaling_factor, the rest does not know it",
    kills="factor-applied-twice",
    applies=has_router,
)
def scaling_factor(case: Case) -> None:
    config = router_of(case).part.config
    if FACTOR not in facts_of(type(config)):
        case.draw.reject(f"this router has no {FACTOR}")
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = settled(case, rows, tokens)
    times = case.choice("times", [2.0, 0.5, 4.0])
    scaled = twin(case, router_of(case), **{FACTOR: getattr(config, FACTOR) * times})
    if scaled is None:
        case.draw.reject(f"{times} times the factor is not allowed")
    none = torch.full((rows, tokens, 1), router_of(case).site.sizes["num_experts"])
    with torch.no_grad():
        base = by(case, x, ids, none, torch.zeros(none.shape)).double()
        plain = transform(case, case.model, x, ids).hidden.double()
        found = transform(case, scaled, x, ids).hidden
    scale = (1 + times) * (size(base) + size(plain))
    case.close(found, base + times * (plain - base), f"with {times} times the factor", scale=scale)


@law(
    "ffn",
    "loads",
    "in training the count router.load says how many real tokens chose each expert, exactly",
    kills="loads-of-first-choices",
    claimed=True,
    applies=has_router,
)
def loads(case: Case) -> None:
    """It is what the router's `after_step` is given as `load`. Metrics are relative to the mean load:
    `max_violation` is the largest, less 1, `min_load` the smallest.
    """
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    experts = router_of(case).site.sizes["num_experts"]
    x, ids = case.stream("x", rows, tokens), case.ids("ids", rows, tokens)
    valid = (
        torch.rand(rows, tokens, generator=torch.Generator().manual_seed(case.integer("padding", 0, 99)))
        < 0.7
    )
    chosen = []
    router = case.model.get_submodule(router_of(case).path)
    hook = router.register_forward_hook(lambda module, entered, routing: chosen.append(routing.indices))
    counts = transform(case, case.model, x, ids, valid).aux.counts
    hook.remove()
    case.equal(len(chosen), 1, "how often the router is asked")
    wanted = torch.bincount(chosen[0][valid].flatten(), minlength=experts + 1)[:experts]
    case.equal(counts.get(f"{router_of(case).path}.load"), wanted, "the load")
    if not hasattr(case.part, "after_step") or not bool(wanted.any()):
        return
    run = Run(step=0, tokens=int(valid.sum()), path=case.node.path, config=case.config)
    told = case.part.after_step({"router.load": wanted}, run) or {}
    even = wanted.double() * experts / wanted.sum()
    for name, value in (("max_violation", even.max() - 1), ("min_load", even.min())):
        if name in told:
            case.within(
                gap(told[name].double(), value), SAFETY * roundoff(told[name].dtype) * size(even), name
            )


@law(
    "ffn",
    "renumbered",
    "experts under other numbers, their tensors and the routing with them, are the same function",
    kills="experts-mixed-with-their-neighbours",
    claimed=True,
    applies=has_router,
)
def renumbered(case: Case) -> None:
    """Every expert's maps are its own, and all experts are computed alike."""
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    experts = router_of(case).site.sizes["num_experts"]
    x, ids = settled(case, rows, tokens)
    order = shuffled(case, "order", experts)  # the expert that is number i now was order[i]
    numbers = torch.argsort(order)
    other = twin(case, router_of(case))
    assert other is not None
    stacks = dict(other.named_parameters())
    with torch.no_grad():
        for linear in case.node.linears.values():
            if linear.groups == experts:
                for weight in linear.weights:
                    tensor = stacks[f"{case.node.path}.{weight.name}"]
                    tensor.copy_(tensor[order])
        routing = case.model.get_submodule(router_of(case).path)(x, case.model.batch(ids))
        wanted = transform(case, case.model, x, ids).hidden
        there = Routing(numbers[routing.indices], routing.weights)
        with routed(case, other, lambda *_, **__: there):
            found = transform(case, other, x, ids).hidden
    case.close(found, wanted, "under other numbers", terms=there.indices.shape[-1])
