"""Laws that optimizers claim: what a parameter's update depends on, what decays, and Adam in closed form.

They know the fields `beta1`, `beta2`, `eps`, `weight_decay`. Matrices are what multiplies: embeddings and weights of
linear maps, no gains and no biases.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from composeformer.testing.bounds import SAFETY, STAGES, gap, roundoff, size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.optimizer import RATES, STEPS, equal
from composeformer.testing.told import shuffled
from composeformer.testing.training import copied, everything, gradient, optimizer, run, served, values
from composeformer.train.roles import Trained


@law(
    "optimizer",
    "each-alone",
    "a parameter's steps depend on its own gradients alone, in any order and any company",
    kills="normalised-by-all-gradients",
    claimed=True,
    applies=served,
)
def each_alone(case: Case) -> None:
    every, rate = everything(case), case.choice("rate", RATES)
    whole = copied(every)
    run(case, optimizer(case, whole, rate), whole, range(2))
    some = [copied(every)[n] for n in shuffled(case, "order", len(every)).tolist()]
    some = some[: case.integer("how many", 1, len(every))]
    run(case, optimizer(case, some, rate), some, range(2))
    found = values(some)
    wanted = {name: each for name, each in values(whole).items() if name in found}
    equal(case, found, wanted, "in other company")


@law(
    "optimizer",
    "elementwise",
    "a parameter cut in two takes the steps of the whole: shards of any layout are updated as one",
    kills="clipped-by-the-norm-of-a-tensor",
    claimed=True,
    applies=served,
)
def elementwise(case: Case) -> None:
    every, rate = everything(case), case.choice("rate", RATES)
    whole = copied(every)
    run(case, optimizer(case, whole, rate), whole, range(2))
    pieces: list[tuple[Trained, Trained, slice]] = []
    for one in copied(every):
        half = case.integer(f"cut {one.name}", 0, len(one.parameter))
        for at in (slice(half), slice(half, None)):
            piece = nn.Parameter(one.parameter.detach()[at].clone())
            pieces.append((one._replace(parameter=piece, name=f"{one.name} {at.start}"), one, at))

    def of(piece: Trained, step: int) -> Tensor:
        (_, one, at) = next(each for each in pieces if each[0] is piece)
        return gradient(case, one.name, step, one.parameter)[at]

    cut = [piece for piece, _, _ in pieces]
    run(case, optimizer(case, cut, rate), cut, range(2), of)
    found = {
        one.name: torch.cat([p.parameter for p, of_, _ in pieces if of_ is one]).detach()
        for _, one, _ in pieces
    }
    equal(case, found, values(whole), "cut in two")


@law(
    "optimizer",
    "still-at-zero",
    "a learning rate of zero changes no parameter",
    kills="decay-without-the-learning-rate",
    claimed=True,
    applies=served,
    examples=8,
)
def still_at_zero(case: Case) -> None:
    every = copied(everything(case))
    before = values(every)
    run(case, optimizer(case, every, 0.0), every, range(2))
    equal(case, values(every), before, "at a learning rate of zero")


@law(
    "optimizer",
    "moments",
    "what is kept of a parameter's shape is in the dtype that the precision policy says, after loading a state, too",
    kills="moments-in-the-weights-dtype",
    claimed=True,
    applies=served,
)
def moments(case: Case) -> None:
    every = copied(everything(case))
    made = optimizer(case, every, 0.01)
    run(case, made, every, [0])
    again = copied(every)
    other = optimizer(case, again, 0.01)
    other.load_state_dict(made.state_dict())
    for each, trained in ((made, every), (other, again)):
        for one in trained:
            stored = str(one.parameter.dtype).removeprefix("torch.")
            wanted = stored if one.format is None else one.format.moment
            kept = [
                t
                for t in each.state[one.parameter].values()
                if isinstance(t, Tensor) and t.shape == one.parameter.shape
            ]
            for tensor in kept if one.parameter.ndim else []:
                case.equal(str(tensor.dtype).removeprefix("torch."), wanted, f"a moment of {one.name}")
    for one, two in zip(every, again, strict=True):
        for name, tensor in made.state[one.parameter].items():
            case.equal(other.state[two.parameter][name], tensor, f"{name} of {one.name}, loaded")


@law(
    "optimizer",
    "scale-free",
    "with an eps of zero, gradients times a power of two take the same steps, bit for bit",
    kills="eps-that-is-always-there",
    claimed=True,
    applies=served,
)
def scale_free(case: Case) -> None:
    every, rate, times = (
        everything(case),
        case.choice("rate", RATES),
        case.choice("times", [2.0**-8, 2.0, 2.0**8]),
    )
    found = []
    for scale in (1.0, times):
        some = copied(every)

        def of(one: Trained, step: int, scale: float = scale) -> Tensor:
            return gradient(case, one.name, step, one.parameter) * scale

        run(case, optimizer(case, some, rate, eps=0.0), some, range(3), of)
        found.append(values(some))
    equal(case, found[1], found[0], f"gradients times {times}")


@law(
    "optimizer",
    "adam",
    "steps are those of Adam with decay outside the moments, of matrices alone",
    kills="moments-start-biased",
    claimed=True,
    applies=served,
    examples=30,
)
def adam(case: Case) -> None:
    """arXiv 1711.05101, algorithm 2, in float64. A step is computed before moments that are narrower than the weights
    are rounded to be kept: of these the first is as exact as any, and each one after it adds a rounding to both.
    """
    fields = {
        "beta1": case.choice("beta1", [0.9, 0.0, 0.5]),
        "beta2": case.choice("beta2", [0.95, 0.0, 0.999]),
        "eps": case.choice("eps", [1e-8, 1e-2, 1.0]),
        "weight_decay": case.choice("decay", [0.1, 0.0, 0.5]),
    }
    every, rate = copied(everything(case)), case.choice("rate", RATES)
    kept = {
        one.format.moment
        for one in every
        if one.format is not None
        and getattr(torch, one.format.moment).itemsize < one.parameter.dtype.itemsize
    }
    starts, made, done = values(every), optimizer(case, every, rate, **fields), 0
    for number in (1, STEPS):
        run(case, made, every, range(done, number))
        done = number
        for one in every:
            steps = [gradient(case, one.name, step, one.parameter).double() for step in range(number)]
            start = starts[one.name].double()
            wanted, magnified = closed(start, steps, rate, fields, multiplies(one))
            # Each step rounds the weight, and the step, too, in the dtype of the weight where that is torch's own.
            moved = rate * (magnified + fields["weight_decay"] * size(start))
            bound = (
                SAFETY
                * sqrt(STAGES * number)
                * roundoff(one.parameter.dtype)
                * (size(start) + number * moved)
            )
            for name in kept:
                # Moments that have been rounded n times are off by as many roundings at most, and so is each step.
                bound += (
                    SAFETY * roundoff(getattr(torch, name)) * number * (number - 1) / 2 * rate * magnified
                )
            case.within(gap(one.parameter, wanted), bound, f"{one.name} after {number} steps")


def multiplies(one: Trained) -> bool:
    """Whether a parameter is a matrix, or a stack of them, and no bias of a map or of a stack of maps."""
    biases = () if one.linear is None else (f"{one.linear.name}.bias",)
    return len(one.weight.shape) >= 2 and one.weight.name not in biases


def closed(
    start: Tensor, steps: Sequence[Tensor], rate: float, fields: dict[str, float], decays: bool
) -> tuple[Tensor, float]:
    """The parameter after the steps, and the largest that a gradient would be in place of their mean in an update: what
    roundings of the mean are relative to.
    """
    beta1, beta2, eps = fields["beta1"], fields["beta2"], fields["eps"]
    value, mean, square, largest, worst = start, 0 * start, 0 * start, 0 * start, 0.0
    for number, step in enumerate(steps, 1):
        mean = beta1 * mean + (1 - beta1) * step
        square = beta2 * square + (1 - beta2) * step**2
        largest = torch.maximum(largest, step.abs())
        divisor = (square / (1 - beta2**number)).sqrt() + eps
        update = mean / (1 - beta1**number) / divisor
        worst = max(worst, size(largest / divisor))
        value = value - rate * (update + (fields["weight_decay"] if decays else 0.0) * value)
    return value, worst
