"""Laws that routers claim of their choice and their weights: what a config's fields say of scores is what happens.

They know the fields `top_k`, `normalize`, `routed_scaling_factor`, `num_groups`, `top_k_groups`, `group_score` (`max`
or `top2`), the one linear map with an output for each expert, and as the bias the one weight of shape (E,) that does
not train. What an expert scores is what it weighs where all are chosen and nothing is normalised.

Logits and biases of few bits are summed exactly in any order: ties are then meant, and go to the lowest index.

Shapes: B rows, T tokens, D features, K experts a token, E experts, G groups.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from composeformer.config import facts_of
from composeformer.contracts import Linear
from composeformer.decoder import Model
from composeformer.plan import Node
from composeformer.testing.bounds import SAFETY, gap, roundoff, size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.router import LONGEST, dense, num_experts, route
from composeformer.testing.twins import twin

# Another way to sort may serve so many tokens.
SEVERAL, MANY = 20, 1100
PLAIN = {"top_k_groups": 1, "num_groups": 1, "routed_scaling_factor": 1.0}


def field(case: Case, name: str, otherwise: Any = None) -> Any:
    """A field of the config, where it has one."""
    return getattr(case.config, name) if name in facts_of(type(case.config)) else otherwise


def having(case: Case, fields: dict[str, Any]) -> dict[str, Any]:
    """Those of the fields that the config has."""
    return {name: value for name, value in fields.items() if name in facts_of(type(case.config))}


def gate(case: Case, model: Model) -> Tensor:
    """The weight (E, D) of the one map to logits; a bias that it has is zero from now on."""
    found = [each for each in case.node.linears.values() if each.outputs == num_experts(case)]
    if len(found) != 1:
        case.draw.reject("it has no single map with an output for each expert")
    return _tensors(case.node, found[0], model)


def _tensors(node: Node, linear: Linear, model: Model) -> Tensor:
    parameters = dict(model.named_parameters())
    if linear.bias:
        parameters[f"{node.path}.{linear.weights[1].name}"].data.zero_()
    return parameters[f"{node.path}.{linear.weight.name}"].data


def bias(case: Case, model: Model) -> Tensor | None:
    """The bias (E,) on the choice, where the router has one."""
    shape = (num_experts(case),)
    names = [n for n, weight in case.node.tensors() if not weight.trains and weight.shape == shape]
    return dict(model.named_buffers())[names[0]] if len(names) == 1 else None


def quantised(case: Case, label: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """Multiples of a half from -1 to 1."""
    generator = torch.Generator().manual_seed(case.integer(label, 0, 2**16))
    return (torch.randint(-2, 3, shape, generator=generator) / 2).to(dtype)


def prepared(case: Case) -> Tensor:
    """Hidden states (1, T, D), few bits or many, with logits and biases alike; biases of any sign."""
    model, coarse = case.model, case.choice("coarse", [True, True, False])
    tokens = case.choice("tokens", [1, LONGEST, SEVERAL])
    weight, moved = gate(case, model), bias(case, model)
    if coarse:
        x = quantised(case, "x", 1, tokens, case.node.site.width, dtype=case.dtype)
        weight.zero_()  # of few features logits take few values, and many are equal
        weight[:, :2] = quantised(case, "gate", num_experts(case), 2, dtype=weight.dtype)
        weight *= case.choice("times", [1, 4])  # few bits still, and probabilities that are no line of them
    else:
        x = case.stream("x", 1, tokens)
    if moved is not None:
        few = quantised(case, "bias", *moved.shape, dtype=moved.dtype)
        moved.copy_(few if coarse else case.normal("biases", *moved.shape, dtype=moved.dtype))
        moved += case.choice("offset", [0.0, -4.0, 1.0])
        # What a step moves: too little for a narrow dtype, and it decides between scores that are equal.
        moved += case.choice("step", [0.0, 2.0**-10]) * quantised(
            case, "steps", *moved.shape, dtype=moved.dtype
        )
    return x


def scores(case: Case, x: Tensor, ids: Tensor) -> Tensor:
    """What each token's experts score (B, T, E), in float64."""
    experts = num_experts(case)
    shown = having(case, {**PLAIN, "top_k": experts, "normalize": False})
    other = twin(case, case.node, **shown)
    if (
        other is None
    ):  # where nothing can be left as it is, scores are shares: they order as those do, unbiased
        moved = bias(case, case.model)
        if moved is not None:
            moved.zero_()
        other = twin(case, case.node, **{**shown, **having(case, {"normalize": True})})
    if other is None:
        case.draw.reject("its scores can not be seen")
    with torch.no_grad():
        return dense(route(case, other, x, ids), experts).double()


def largest(found: Tensor, k: int, unit: float) -> tuple[Tensor, Tensor]:
    """Indices (..., k) of the k largest, among equals the lowest; and where (...) rounding does not decide."""
    ordered = found.sort(dim=-1, descending=True, stable=True)
    clear = torch.ones(found.shape[:-1], dtype=torch.bool)
    if k < found.shape[-1]:
        margin = ordered.values[..., k - 1] - ordered.values[..., k]
        clear = (margin == 0) | (margin > unit)
    return ordered.indices[..., :k], clear


def unit_of(case: Case, found: Tensor) -> float:
    """What rounding can do to a sum of two scores and biases, as routers compute them."""
    kind = torch.promote_types(case.dtype, torch.float32)
    return case.terms.error(kind) * max(1.0, size(found))


def allowed(case: Case, found: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts (B, T, E) are in a token's best groups by their scores with biases; and of which tokens (B, T) that
    is clear.
    """
    groups, of = field(case, "num_groups", 1), field(case, "top_k_groups", 1)
    if of >= groups:
        return torch.ones_like(found, dtype=torch.bool), torch.ones(found.shape[:-1], dtype=torch.bool)
    inside = found.view(*found.shape[:-1], groups, -1)
    best = inside.amax(-1) if case.config.group_score == "max" else inside.topk(2).values.sum(-1)
    chosen, clear = largest(best, of, unit_of(case, found))
    open_G = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)
    return open_G[..., None].expand(inside.shape).flatten(-2), clear


def biased(case: Case, x: Tensor, ids: Tensor) -> Tensor:
    """Scores with biases (B, T, E)."""
    found, moved = scores(case, x, ids), bias(case, case.model)
    return found if moved is None else found + moved.double()


@law(
    "router",
    "groups",
    "experts are of the top_k_groups best groups by group_score, for any sign of the biases",
    kills="group-score-of-one-expert",
    claimed=True,
)
def groups(case: Case) -> None:
    if field(case, "top_k_groups", 1) >= field(case, "num_groups", 1):
        case.draw.reject("all groups are allowed")
    x = prepared(case)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    inside, clear = allowed(case, biased(case, x, ids))
    indices = route(case, case.model, x, ids).indices
    case.require(bool(inside.gather(-1, indices)[clear].all()), "an expert is outside the best groups")


@law(
    "router",
    "exact-top-k",
    "the experts are those of the largest scores, biases added, in the groups allowed; ties go to the lowest",
    kills="ties-to-the-highest",
    claimed=True,
    examples=20,
)
def exact_top_k(case: Case) -> None:
    x = prepared(case)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    found = biased(case, x, ids)
    inside, open_groups = allowed(case, found)
    wanted, clear = largest(found.masked_fill(~inside, -torch.inf), case.config.top_k, unit_of(case, found))
    wanted = wanted.sort(-1).values
    times = MANY // x.shape[1]
    many = route(case, case.model, x.repeat(1, times, 1), ids.repeat(1, times)).indices
    for indices, told in ((route(case, case.model, x, ids).indices, "few"), (many, "many")):
        rows = indices.sort(-1).values.view(-1, *wanted.shape)
        odd = (rows != wanted).any(-1) & clear & open_groups
        if bool(odd.any()):
            place = tuple(odd.nonzero()[0].tolist())
            chosen, must = rows[place].tolist(), wanted[place[1:]].tolist()
            case.require(
                False, f"among {told} tokens, token {place[-1]} chooses {chosen}, must choose {must}"
            )


@law(
    "router",
    "bias-selects-only",
    "a bias decides who is chosen and is in no weight: where the choice stays, so do the weights, bit for bit",
    kills="weights-of-biased-scores",
    claimed=True,
)
def bias_selects_only(case: Case) -> None:
    tokens = case.integer("tokens", 1, LONGEST)
    x, ids = case.stream("x", 1, tokens), case.ids("ids", 1, tokens)
    moved, shape = bias(case, case.model), (num_experts(case),)
    if moved is None:
        case.draw.reject("it has no bias of one number an expert that does not train")
    way = case.normal("bias", *shape, dtype=moved.dtype) * case.choice("scale", [0.01, 0.1, 1.0])
    routings = []
    with torch.no_grad():
        for each in (torch.zeros(shape), way, way - 4):
            moved.copy_(each)
            routings.append(route(case, case.model, x, ids))
        first = routings[0]
        for other in routings[1:]:
            same = (other.indices == first.indices).all(-1)
            case.equal(other.weights[same], first.weights[same], "weights of an unchanged choice")
        one = case.integer("one", 0, num_experts(case) - 1)
        moved.zero_()[one] = 16.0
        found = route(case, case.model, x, ids).indices
        case.require(bool((found == one).any(-1).all()), "a bias of 16 chooses no expert")


@law(
    "router",
    "scaling-factor",
    "weights are linear in routed_scaling_factor, and nothing else depends on it",
    kills="factor-only-when-normalised",
    claimed=True,
)
def scaling_factor(case: Case) -> None:
    tokens, times = case.integer("tokens", 1, LONGEST), case.choice("times", [2.0, 0.5, 3.0])
    x, ids = case.stream("x", 1, tokens), case.ids("ids", 1, tokens)
    other = twin(case, case.node, routed_scaling_factor=case.config.routed_scaling_factor * times)
    if other is None:
        case.draw.reject(f"{times} times the factor is not allowed")
    with torch.no_grad():
        plain, found = (route(case, each, x, ids) for each in (case.model, other))
    case.equal(found.indices, plain.indices, "the choice")
    unit = SAFETY * 2 * roundoff(plain.weights.dtype)
    case.within(gap(found.weights, times * plain.weights), unit * size(found.weights), "the weights")
    for name, loss in plain.aux.losses.items():
        case.equal(found.aux.losses[name], loss, f"the loss {name}")


@law(
    "router",
    "normalised",
    "weights are scores times the factor; normalised they are shares, which sum to the factor for any logits",
    kills="sum-of-weights-underflows",
    claimed=True,
)
def normalised(case: Case) -> None:
    tokens, factor = case.integer("tokens", 1, LONGEST), case.config.routed_scaling_factor
    x, ids = case.stream("x", 1, tokens), case.ids("ids", 1, tokens)
    offset = case.choice("offset", [0.0, 0.0, -300.0, -80.0, 80.0])
    with torch.no_grad():
        x[..., 0] = 1
        gate(case, case.model)[:, 0] += offset
        plain = scores(case, x, ids)  # without a bias where they are shares
        routing = route(case, case.model, x, ids)
    weights = routing.weights.double()
    case.finite(weights, "the weights")
    case.require(not bool((weights < 0).any()), "a weight is negative")
    chosen = plain.gather(-1, routing.indices)
    sums = chosen.sum(-1, keepdim=True)
    shares = field(case, "normalize", False)
    unit = case.terms.error(torch.promote_types(case.dtype, torch.float32)) * max(1.0, abs(offset))
    if shares:
        case.within(
            gap(weights.sum(-1), torch.full_like(sums[..., 0], factor)), unit * factor, "the sum of weights"
        )
    if offset == 0:
        wanted = factor * (chosen / sums if shares else chosen)
        case.within(gap(weights, wanted), unit * size(wanted), "the weights")


@law(
    "router",
    "shift",
    "a number added to all logits of a token changes neither its choice nor its weights",
    kills="exponentials-overflow",
    claimed=True,
)
def shift(case: Case) -> None:
    tokens, offset = case.integer("tokens", 1, LONGEST), case.choice("offset", [1000.0, -1000.0, 3.0])
    x, ids = case.stream("x", 1, tokens), case.ids("ids", 1, tokens)
    with torch.no_grad():
        x[..., 0] = 1
        weight = gate(case, case.model)
        weight[:, 0] = 0
        plain = dense(route(case, case.model, x, ids), num_experts(case))
        unit = case.terms.error(torch.promote_types(case.dtype, torch.float32)) * abs(offset)
        # Logits as near as this may be one after the shift.
        _, clear = largest(scores(case, x, ids).log(), case.config.top_k, unit)
        weight[:, 0] = offset
        found = dense(route(case, case.model, x, ids), num_experts(case))
    case.within(gap(found[clear], plain[clear]), unit * size(plain), "the weights")


def by_definition(case: Case, told: str, of: Callable[[Tensor], Tensor]) -> None:
    """Scores are `of` the logits."""
    tokens = case.integer("tokens", 1, LONGEST)
    x, ids = case.stream("x", 1, tokens), case.ids("ids", 1, tokens)
    logits = x.double() @ gate(case, case.model).double().T
    found, wanted = scores(case, x, ids), of(logits)
    kind = torch.promote_types(case.dtype, torch.float32)
    # A rounding of a logit is one of the score, relative to it, times the logit.
    unit = case.terms.error(kind) * max(1.0, size(logits))
    case.within(gap(found, wanted), unit * size(wanted), told)


@law(
    "router",
    "softmax",
    "scores are the softmax of all logits",
    kills="softmax-at-another-temperature",
    claimed=True,
)
def softmax(case: Case) -> None:
    by_definition(case, "the softmax of logits", lambda logits: logits.softmax(-1))


@law(
    "router",
    "sigmoid",
    "scores are the sigmoids of logits, each its own",
    kills="softmax-for-sigmoids",
    claimed=True,
)
def sigmoid(case: Case) -> None:
    by_definition(case, "the sigmoids of logits", torch.sigmoid)
