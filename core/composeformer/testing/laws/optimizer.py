"""Laws of optimizers: resumed is never stopped, and each group's `lr` is the learning rate.

An optimizer is of torch's interface; it is made over a model's parameters and given gradients that are drawn.
"""

import copy
from numbers import Number

import torch
from torch import Tensor

from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.training import copied, everything, gradient, optimizer, run, served, values
from composeformer.train.roles import Trained

RATES = (0.125, 0.01, 1e-3)
STEPS = 4


def equal(case: Case, found: dict[str, Tensor], wanted: dict[str, Tensor], told: str) -> None:
    """The same bits, by name."""
    case.equal(sorted(found), sorted(wanted), f"{told}: the names")
    for name, each in wanted.items():
        case.equal(found[name], each, f"{told}: {name}")


@law(
    "optimizer",
    "resumed",
    "an optimizer made anew that loads a state goes on as the one that was never stopped, bit for bit",
    kills="steps-forgotten-by-the-state",
    applies=served,
)
def resumed(case: Case) -> None:
    """And the state that was taken holds still while the first goes on."""
    every, rate = everything(case), case.choice("rate", RATES)
    stop = case.integer("stop", 0, STEPS - 1)
    whole, first = copied(every), copied(every)
    run(case, optimizer(case, whole, rate), whole, range(STEPS))
    made = optimizer(case, first, rate)
    run(case, made, first, range(stop))
    state, second = copy.deepcopy(made.state_dict()), copied(first)
    again = optimizer(case, second, rate)
    again.load_state_dict(state)
    run(case, again, second, range(stop, STEPS))
    equal(case, values(second), values(whole), f"stopped after {stop} of {STEPS} steps")


@law(
    "optimizer",
    "state",
    "a state is of tensors and plain values, has every parameter once, and each group has `lr`",
    kills="bias-in-no-group",
    applies=served,
    examples=8,
)
def state(case: Case) -> None:
    every, rate = copied(everything(case)), case.choice("rate", RATES)
    made = optimizer(case, every, rate)
    names = {id(one.parameter): one.name for one in every}
    held = [names.get(id(p), "another one") for group in made.param_groups for p in group["params"]]
    case.equal(sorted(held), sorted(names.values()), "the parameters in groups")
    for group in made.param_groups:
        case.equal(group["lr"], rate, "the lr of a group")
    run(case, made, every, [0])
    told = made.state_dict()
    plain = (Number, str, bool, Tensor, type(None))
    for key, each in [
        *((k, v) for group in told["param_groups"] for k, v in group.items() if k != "params"),
        *((k, v) for kept in told["state"].values() for k, v in kept.items()),
    ]:
        parts = each if isinstance(each, list | tuple) else [each]
        case.require(all(isinstance(part, plain) for part in parts), f"{key} is a {type(each).__name__}")


@law(
    "optimizer",
    "learning-rate",
    "the `lr` of its groups is the learning rate, whenever it is set",
    kills="learning-rate-of-the-start",
    applies=served,
)
def learning_rate(case: Case) -> None:
    every, rate, late = copied(everything(case)), case.choice("rate", RATES), case.integer("late", 0, 2)
    for one in every:
        one.parameter.data.zero_()  # small steps are not lost in large weights
    usual, changed, made_with = copied(every), copied(every), copied(every)
    paths: list[list[dict[str, Tensor]]] = []
    for trained, start, rates in (
        (usual, 1.0, [rate] * 3),
        (changed, 1.0, [rate if step < late else 2 * rate for step in range(3)]),
        (made_with, rate, [None] * 3),
    ):
        made = optimizer(case, trained, start)
        paths.append([])
        for step, each in enumerate(rates):
            for group in made.param_groups:
                group["lr"] = group["lr"] if each is None else each
            run(case, made, trained, [step])
            paths[-1].append(values(trained))
    equal(
        case, values(usual), values(made_with), "a rate set before the first step, and one given at the start"
    )
    # At some step: later ones of the same size may take back what the first one moved.
    for one in usual:
        moved = any(not torch.equal(a[one.name], b[one.name]) for a, b in zip(*paths[:2], strict=True))
        case.require(moved, f"twice the rate from step {late} on changes nothing of {one.name}")


@law(
    "optimizer",
    "gradients",
    "a step leaves gradients as they are, parameters where they are, and what has none alone",
    kills="decay-without-a-gradient",
    applies=served,
)
def gradients(case: Case) -> None:
    every = copied(everything(case))
    made = optimizer(case, every, case.choice("rate", RATES))
    places = [one.parameter.data_ptr() for one in every]
    without = every[case.integer("without", 0, len(every) - 1)].name

    def of(one: Trained, step: int) -> Tensor | None:
        return None if one.name == without else gradient(case, one.name, step, one.parameter)

    before = values(every)
    run(case, made, every, range(2), of)
    for one, place in zip(every, places, strict=True):
        case.equal(one.parameter.data_ptr(), place, f"where {one.name} is")
        case.equal(one.parameter.dtype, before[one.name].dtype, f"the dtype of {one.name}")
        if one.name == without:
            case.equal(one.parameter.detach(), before[one.name], f"{one.name}, which had no gradient")
            continue
        assert one.parameter.grad is not None
        case.equal(
            one.parameter.grad, gradient(case, one.name, 1, one.parameter), f"the gradient of {one.name}"
        )
        case.finite(one.parameter, one.name)


@law(
    "optimizer",
    "downhill",
    "from weights of zero a first step goes against the gradient",
    kills="steps-uphill",
    applies=served,
    examples=8,
)
def downhill(case: Case) -> None:
    """Of zero there is nothing to decay."""
    every = copied(everything(case))
    for one in every:
        one.parameter.data.zero_()
    run(case, optimizer(case, every, case.choice("rate", RATES)), every, [0])
    for one in every:
        slope = (one.parameter.detach().double() * gradient(case, one.name, 0, one.parameter).double()).sum()
        case.require(float(slope) < 0, f"{one.name} goes along its gradient")


@law(
    "optimizer",
    "closure",
    "a step calls the closure that it is given, with gradients on, and returns its loss",
    kills="closure-without-gradients",
    applies=served,
    examples=5,
)
def closure(case: Case) -> None:
    every = copied(everything(case))
    plain = copied(every)
    rate = case.choice("rate", RATES)
    made = optimizer(case, every, rate)

    def loss() -> Tensor:
        made.zero_grad()
        total = sum(
            (one.parameter * gradient(case, one.name, 0, one.parameter)).sum().double() for one in every
        )
        assert isinstance(total, Tensor)
        torch.autograd.backward(total)
        return total

    found = made.step(loss)  # type: ignore[arg-type]
    case.require(found is not None, "the step returns nothing")
    run(case, optimizer(case, plain, rate), plain, [0])
    equal(case, values(every), values(plain), "a step with a closure")
