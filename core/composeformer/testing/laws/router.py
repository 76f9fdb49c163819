"""Laws of routers: distinct experts, each token alone given its id; padding is nowhere; losses add.

A router need not have a gate, nor gradients. Its answer is compared as the weight that each token gives each expert;
cases in which another rounding would turn a choice say nothing.

Shapes: B rows, T tokens, D features, K experts a token, E experts.
"""

from functools import partial

import torch
from torch import Tensor

from composeformer.config import facts_of
from composeformer.contracts import PHASES, Phase
from composeformer.counting import count_positions
from composeformer.decoder import Model
from composeformer.tensors import Batch, Routing
from composeformer.testing.bounds import gap, roundoff, size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.slopes import differences
from composeformer.testing.subject import Subject
from composeformer.testing.told import Told, alike, back, ragged, row_by_row, shuffled, together

MOST, LONGEST = 3, 6
# How much larger than a rounding the changes are that must turn no choice, and how many are tried, each in both ways.
WIDER, TRIES = 8, 3
# What padding holds: finite, as an ffn hands it on.
HUGE = 1e9


def num_experts(case: Case) -> int:
    """E."""
    found: int = case.node.site.sizes["num_experts"]
    return found


def route(
    case: Case, model: Model, x: Tensor, ids: Tensor, valid: Tensor | None = None, phase: Phase = "train"
) -> Routing:
    """The routing of a model's router over x (B, T, D) as an ffn calls it."""
    positions = count_positions(ids, None, valid)
    found: Routing = case.part_of(model)(
        x, Batch(ids, positions, None, valid, model.rotary(positions), phase)
    )
    return found


def dense(routing: Routing, experts: int) -> Tensor:
    """What each token weighs each expert (B, T, E)."""
    indices, weights, _ = routing
    zeros = weights.new_zeros(*weights.shape[:-1], experts + 1)
    return zeros.scatter_add(-1, indices, weights)[..., :experts]


def value(case: Case, model: Model, x: Tensor, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """The weights of real tokens and the losses as one vector."""
    routing = route(case, model, x, ids, valid)
    weights = dense(routing, num_experts(case))
    weights = weights if valid is None else weights[valid]
    losses = [each.sum()[None] for each in routing.aux.losses.values()]
    return torch.cat([weights.flatten(), *losses]) + x[..., :0].sum()


def told(case: Case, x: Tensor, ids: Tensor, cotangent: Tensor, valid: Tensor | None = None) -> Told:
    """A router's weights (B, T, E) and side results, with gradients for a cotangent of the weights."""
    x = x.detach().clone().requires_grad_()
    case.model.zero_grad(set_to_none=True)
    routing = route(case, case.model, x, ids, valid)
    return back(case.model, x, dense(routing, num_experts(case)), routing.aux, cotangent)


def steady(
    case: Case, x: Tensor, ids: Tensor, valid: Tensor | None = None, dtype: torch.dtype | None = None
) -> None:
    """Measures the case's condition, and rejects a case where changes of several roundings turn a choice."""
    case.settle(lambda model, y: value(case, model, y, ids, valid), x)
    judge, exact = case.judge, x.double()
    unit = WIDER * roundoff(case.dtype if dtype is None else dtype)
    generator = torch.Generator().manual_seed(0)
    places = [exact, *(p for p in judge.parameters() if p.dtype == torch.float64)]
    kept = [each.detach().clone() for each in places]

    def chosen() -> Tensor:
        found = route(case, judge, exact, ids, valid).indices.sort(-1).values
        return found if valid is None else found[valid]

    with torch.no_grad():
        wanted = chosen()
        for _ in range(TRIES):
            ways = [each * torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in kept]
            for sign in (unit, -unit):
                for place, start, way in zip(places, kept, ways, strict=True):
                    place.copy_(start + sign * way)
                turned = not torch.equal(chosen(), wanted)
                for place, start in zip(places, kept, strict=True):
                    place.copy_(start)
                if turned:
                    case.draw.reject("a rounding turns a choice")


def steadied(case: Case, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A stream and token ids of a case that says something."""
    x, ids = case.stream("x", rows, tokens), case.ids("ids", rows, tokens)
    steady(case, x, ids)
    return x, ids


def proper(case: Case, routing: Routing, what: str) -> None:
    """Indices are of distinct experts, or of none; there is a weight for each, in fp32 or wider."""
    indices, weights, aux = routing
    experts = num_experts(case)
    case.require(indices.dtype == torch.int64, f"{what}: indices are {indices.dtype}, must be int64")
    case.equal(tuple(weights.shape), tuple(indices.shape), f"{what}: the shape of the weights")
    wide = weights.dtype in (torch.float32, torch.float64)
    case.require(wide, f"{what}: weights are {weights.dtype}, must be fp32 or wider")
    inside = bool(((indices >= 0) & (indices <= experts)).all())
    case.require(inside, f"{what}: an index is not within 0 and {experts}")
    ordered = indices.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < experts)
    case.require(not bool(twice.any()), f"{what}: a token has an expert twice")
    for name, loss in aux.losses.items():
        case.require(loss.dtype in (torch.float32, torch.float64), f"the loss {name} is {loss.dtype}")
        case.require(name.startswith(f"{case.node.path}."), f"{name} is not below {case.node.path}")
    for name, count in aux.counts.items():
        case.require(count.dtype == torch.int64, f"the count {name} is {count.dtype}, must be int64")


@law(
    "router",
    "routing",
    "a token names top_k distinct experts with finite weights in fp32 or wider",
    kills="weights-in-the-dtype-of-activations",
)
def routing(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = case.stream("x", rows, tokens), case.ids("ids", rows, tokens)
    scale = case.choice("scale", [1.0, 0.0, 100.0])
    for phase in PHASES:
        found = route(case, case.model, x * scale, ids, phase=phase)
        proper(case, found, f"in {phase}")
        case.finite(found.weights, f"in {phase}: the weights")
        case.equal(found.indices.shape[:2], x.shape[:2], f"in {phase}: the tokens of the indices")
        if "top_k" in facts_of(case.subject.component.config):
            case.equal(found.indices.shape[-1], case.config.top_k, f"in {phase}: the experts of a token")


@law(
    "router",
    "token-alone",
    "a token by itself is routed as at any place of any batch",
    kills="logits-centred-over-the-batch",
)
def token_alone(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = steadied(case, rows, tokens)
    flat, flat_ids = x.flatten(0, 1), ids.flatten()
    one, order = case.integer("one", 0, rows * tokens - 1), shuffled(case, "order", rows * tokens)
    elsewhere = flat[order].view(tokens, rows, -1), flat_ids[order].view(tokens, rows)
    with torch.no_grad():
        whole, alone, moved = (
            dense(route(case, case.model, *each), num_experts(case)).flatten(0, 1)
            for each in ((x, ids), (flat[one][None, None], flat_ids[one][None, None]), elsewhere)
        )
    case.close(alone[0], whole[one], "a token by itself", scale=size(whole))
    case.close(moved, whole[order], "tokens at other places")


@law(
    "router",
    "others-do-not-matter",
    "logits that are not finite spoil their own token alone, and name experts that there are",
    kills="shifted-by-the-largest-of-all-tokens",
)
def others_do_not_matter(case: Case) -> None:
    tokens = case.integer("tokens", 2, LONGEST)
    x, ids = steadied(case, 1, tokens)
    spoilt = shuffled(case, "spoilt", tokens)[: case.integer("how many", 1, tokens - 1)]
    rest = torch.ones(tokens, dtype=torch.bool).index_fill(0, spoilt, False)
    y = x.clone()
    y[:, spoilt] = case.choice("what", [torch.nan, torch.inf, -torch.inf, 1e30])
    with torch.no_grad():
        before, after = route(case, case.model, x, ids), route(case, case.model, y, ids)
    proper(case, after, "spoilt tokens")
    found, wanted = (dense(each, num_experts(case))[:, rest] for each in (after, before))
    case.close(found, wanted, "tokens beside spoilt ones")


@law(
    "router",
    "padding",
    "padding, wherever it stands and whatever finite it holds, is in no loss, count or gradient",
    kills="padding-in-the-balance-loss",
)
def padding(case: Case) -> None:
    """Against each row by itself, without its padding: so rows of unlike lengths add, too."""
    valid = ragged(case, MOST, LONGEST)
    x, ids = case.stream("x", *valid.shape), case.ids("ids", *valid.shape)
    steady(case, x, ids, valid)
    cotangent = case.normal("cotangent", *valid.shape, num_experts(case))
    cotangent = cotangent.masked_fill(~valid[:, :, None], 0)
    padded = x.masked_fill(~valid[:, :, None], HUGE)
    found = told(case, padded, ids, cotangent, valid)
    row_by_row(case, partial(told, case), found, (x, ids, cotangent), valid)


@law(
    "router",
    "rows-add",
    "losses, counts and gradients of some rows and of the others add to those of all",
    kills="z-loss-is-a-mean",
)
def rows_add(case: Case) -> None:
    rows, tokens = case.integer("rows", 2, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = steadied(case, rows, tokens)
    cotangent = case.normal("cotangent", rows, tokens, num_experts(case))
    first = case.integer("first", 1, rows - 1)
    parts = [told(case, x[at], ids[at], cotangent[at]) for at in (slice(first), slice(first, None))]
    alike(case, together(parts), told(case, x, ids, cotangent), "in two parts", rows * tokens)


@law(
    "router",
    "no-tokens",
    "no tokens, or padding alone, give losses and counts of zero, and gradients of zero",
    kills="mean-over-no-tokens",
)
def no_tokens(case: Case) -> None:
    rows, tokens = case.integer("rows", 0, 2), case.integer("tokens", 0, 2)
    x, ids = case.stream("x", rows, tokens), case.ids("ids", rows, tokens)
    empty = not x.numel()
    valid = torch.zeros(rows, tokens, dtype=torch.bool) if not empty or case.boolean("valid") else None
    found = told(case, x, ids, torch.zeros(rows, tokens, num_experts(case)), valid)
    usual = told(case, case.stream("y", 1, 1), case.ids("an id", 1, 1), torch.ones(1, 1, num_experts(case)))
    case.equal(
        sorted(found.gradients), sorted(usual.gradients), "what has a gradient, of no token and of one"
    )
    rest = {name: each for name, each in found.gradients.items() if name != "output"}
    for name, each in {**rest, **found.losses, **found.counts}.items():
        case.require(not bool(each.any()), f"no tokens: {name} is not zero")


@law(
    "router",
    "phases",
    "a token is routed alike in every phase; losses and counts are training's alone",
    kills="losses-in-evaluation",
)
def phases(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = steadied(case, rows, tokens)
    with torch.no_grad():
        found = {phase: route(case, case.model, x, ids, phase=phase) for phase in PHASES}
    wanted = dense(found["train"], num_experts(case))
    for phase in PHASES[1:]:
        case.close(dense(found[phase], num_experts(case)), wanted, f"the weights in {phase}")
        given = [*found[phase].aux.losses, *found[phase].aux.counts]
        case.require(not given, f"in {phase} it gives {', '.join(given)}")


def only_reference(subject: Subject) -> str | None:
    """Others have the reference's gradients, by a law of every slot."""
    return None if subject.implementation.name == "reference" else "it is the reference's"


@law(
    "router",
    "derivative",
    "gradients are the derivatives of the weights and the losses",
    kills="normaliser-without-a-gradient",
    claimed=True,
    applies=only_reference,
)
def derivative(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = case.stream("x", rows, tokens).double(), case.ids("ids", rows, tokens)
    mix = case.normal("mix", 64, dtype=torch.float64)

    def weighed(y: Tensor) -> Tensor:
        found = value(case, case.judge, y, ids)
        return found * mix.repeat(-(-len(found) // 64))[: len(found)]

    differences(case, weighed, x, "the derivative of weights and losses")


@law(
    "router",
    "single-precision",
    "choices and weights are those of fp32 or wider, whatever the dtype of activations",
    kills="logits-in-bfloat16",
    claimed=True,
)
def single_precision(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = case.stream("x", rows, tokens), case.ids("ids", rows, tokens)
    wide = torch.promote_types(case.dtype, torch.float32)
    steady(case, x, ids, dtype=wide)
    with torch.no_grad():
        found = dense(route(case, case.model, x, ids), num_experts(case))
        wanted = dense(route(case, case.judge, x.double(), ids), num_experts(case))
    bound = case.terms.error(wide) * case.condition.output * size(wanted)
    case.within(gap(found, wanted), bound, "weights against those in float64")
