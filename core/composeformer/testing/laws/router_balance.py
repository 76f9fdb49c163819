"""Laws that routers claim of what evens out their loads: losses in closed form, and a bias that moves after each step.

    balance = alpha sum_s T_s sum_i f_si P_si       f_si = E / (K T_s) count_si        P_si = 1 / T_s sum_{t in s} p_ti

over sequences (rows) s of T_s real tokens, with p the scores, divided by their sum (arXiv 2412.19437, equations 17 to
20, each sequence by its tokens); no gradient passes the counts. z = alpha sum_t logsumexp(logits_t)^2 (arXiv
2202.08906, equation 5).

The losses are `balance` and `z` below the router's path, alpha the field whose name ends in `balance_alpha`, and
`z_alpha`; the bias moves by the field `bias_update_speed`, as scheduled, by the count `load` of its experts (arXiv
2408.15664, algorithm 1).

Shapes: B rows, T tokens, D features, K experts a token, E experts.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from composeformer.config import facts_of
from composeformer.errors import join
from composeformer.testing.bounds import FLOOR, gap, size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.router import LONGEST, MOST, dense, num_experts, route
from composeformer.testing.laws.router_choice import PLAIN, bias, gate, having
from composeformer.testing.twins import twin
from composeformer.train.after import Run, after_step

SPEED = "bias_update_speed"


def alpha_of(case: Case, ending: str) -> float:
    """The weight of a loss: the field whose name ends so."""
    found = [name for name in facts_of(type(case.config)) if name.endswith(ending)]
    if len(found) != 1:
        case.draw.reject(f"it has no single field that ends in {ending}")
    weight: float = getattr(case.config, found[0])
    return weight


def tokens_of(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """A stream, a leaf; ids; which tokens are real."""
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    seeds = torch.Generator().manual_seed(case.integer("padding", 0, 2**16))
    valid = torch.rand(rows, tokens, generator=seeds) < 0.7 if case.boolean("padded") else None
    x = case.stream("x", rows, tokens)
    return x.requires_grad_(), case.ids("ids", rows, tokens), valid


def agrees(
    case: Case,
    name: str,
    alpha: float,
    wanted: Callable[[Tensor], Tensor],
    drawn: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """The loss `name` and its gradient are those of `wanted(indices)`; without a weight there is none."""
    x, ids, valid = drawn
    routing = route(case, case.model, x, ids, valid)
    losses = routing.aux.losses
    path = join(case.node.path, name)
    if not alpha:
        case.require(path not in losses, f"the loss {path} has no weight")
        return
    case.require(path in losses, f"there is no loss {path}")
    case.settle(
        lambda model, y: route(case, model, y, ids, valid).aux.losses[path].sum() + y[..., :0].sum(), x
    )
    right = alpha * wanted(routing.indices)
    kind = torch.promote_types(case.dtype, torch.float32)
    unit = case.terms.plus(x.shape[0] * x.shape[1]).error(kind)
    found = losses[path].sum()
    case.require(found.requires_grad or not right.requires_grad, f"the loss {path} has no gradient")
    case.within(gap(found, right), unit * case.condition.output * size(right), path)
    entered = [x, *case.part.parameters()]
    every = torch.autograd.grad(found, entered, allow_unused=True)
    (must,) = torch.autograd.grad(right + x[..., :0].sum(), x)
    # The condition was measured to the largest of all gradients where one is small beside that.
    scale = max(size(must), FLOOR * max((size(each) for each in every if each is not None), default=0.0))
    got = torch.zeros_like(x) if every[0] is None else every[0]
    unit = case.terms.plus(x.shape[0] * x.shape[1]).error(case.dtype)
    case.within(gap(got, must), unit * case.condition.gradients * scale, f"the gradient of {path}")


@law(
    "router",
    "balance",
    "the balance loss and its gradient are the closed form of each sequence, times its real tokens",
    kills="balance-by-padded-length",
    claimed=True,
)
def balance(case: Case) -> None:
    x, ids, valid = drawn = tokens_of(case)
    experts = num_experts(case)
    shown = having(case, {**PLAIN, "top_k": experts, "normalize": False})
    other = twin(case, case.node, **shown) or twin(
        case, case.node, **{**shown, **having(case, {"normalize": True})}
    )
    if other is None:
        case.draw.reject("its scores can not be seen")

    def closed(indices: Tensor) -> Tensor:
        scores = dense(route(case, other, x, ids), experts).double()
        total = torch.zeros((), dtype=torch.float64)
        for row in range(len(x)):
            real = torch.ones_like(ids[row], dtype=torch.bool) if valid is None else valid[row]
            length = int(real.sum())
            if length:
                shares = (scores[row, real] / scores[row, real].sum(-1, keepdim=True)).mean(0)
                counts = torch.bincount(indices[row, real].flatten(), minlength=experts).double()
                total = total + length * (experts / (indices.shape[-1] * length) * counts * shares).sum()
        return total

    agrees(case, "balance", alpha_of(case, "balance_alpha"), closed, drawn)


@law(
    "router",
    "z-loss",
    "the z-loss and its gradient are those of squared log-sum-exps of real tokens' logits",
    kills="z-loss-without-a-square",
    claimed=True,
)
def z_loss(case: Case) -> None:
    x, _, valid = drawn = tokens_of(case)
    weight = gate(case, case.model)

    def closed(indices: Tensor) -> Tensor:
        squares = (x.double() @ weight.double().T).logsumexp(-1).square()
        return (squares if valid is None else squares[valid]).sum()

    agrees(case, "z", alpha_of(case, "z_alpha"), closed, drawn)


@law(
    "router",
    "after-step",
    "a step moves each bias by the speed, up where its load is below the mean, in place and in exact integers",
    kills="bias-moved-out-of-place",
    claimed=True,
)
def moved_after_step(case: Case) -> None:
    """Loads are large, and differ by little: sums in floating point would call them equal."""
    model, experts = case.model, num_experts(case)
    moved = bias(case, model)
    case.require(moved is not None, "there is no bias of one number an expert that does not train")
    assert moved is not None
    name = next(name for name, each in model.named_buffers() if each is moved)
    case.require(name not in dict(model.named_parameters()), f"{name} is a parameter")
    state, mean = model.state_dict(), case.choice("mean", [0, 3, 2**24, 2**40])
    load = torch.tensor(case.integers("loads", -3, 3, experts, experts)).clamp(min=-mean) + mean
    direction = torch.sign(load.sum() - load * experts).double()

    def step(totals: Mapping[str, Tensor], values: Mapping[str, float]) -> Tensor:
        path = case.node.path
        run = Run(
            step=0, tokens=1, path="", config=None, values={join(path, each): v for each, v in values.items()}
        )
        after_step(model, {join(path, each): count for each, count in totals.items()}, run)
        return dict(model.named_buffers())[name]

    before = moved.clone()
    speed = case.choice("speed", [0.0, 0.125, 2.0**-10])
    found = step({"load": load}, {SPEED: speed})
    case.equal(found, (before.double() + direction * speed).to(before.dtype), "biases after a step")
    case.require(found is moved, "the bias is another tensor than before the step")
    case.require(state[name].data_ptr() == moved.data_ptr(), "a state_dict taken before has other memory")
    case.equal(step({}, {SPEED: speed}), found.clone(), "biases after a step without a load")
    before = moved.clone()
    wanted = before.double() + direction * getattr(case.config, SPEED)
    found = step({"load": load}, {})
    unit = case.terms.error(before.dtype) * (size(before) + getattr(case.config, SPEED))
    case.within(gap(found, wanted), unit, "biases after a step at the speed of the config")
