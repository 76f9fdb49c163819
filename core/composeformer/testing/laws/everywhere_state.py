"""Laws of every part that is called with tensors: what it is lies in its saved tensors, and no forward changes it.

Shapes: B rows, T tokens, D features.
"""

import tempfile
from copy import deepcopy
from itertools import combinations
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from composeformer.assemble import build
from composeformer.contracts import Constant
from composeformer.decoder import Model
from composeformer.plugins import current
from composeformer.store import load, save
from composeformer.testing.bounds import roundoff
from composeformer.testing.calling import call, entered, entering, uncalled
from composeformer.testing.case import Case
from composeformer.testing.law import EVERYWHERE, law
from composeformer.testing.slopes import differences

# Tensors of so many elements are not the same by chance; and sums are beyond their bounds once in e^TAIL.
DISTINCT, TAIL = 8, 40
# What every module has, and what changes by being told to.
PLAIN = {*vars(nn.Module()), "forward"}


def held(model: Model) -> dict[str, Any]:
    """All that a model holds: copies of its tensors, and the other attributes of its modules as they are."""
    found: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in PLAIN}
        found |= {f"{path}: {name}": value for name, value in own.items()}
    return found


def same(case: Case, found: dict[str, Any], wanted: dict[str, Any], told: str) -> None:
    """What was held, unchanged: tensors to the bit, the rest by identity or equality."""
    for name in sorted({*found} ^ {*wanted}):
        case.require(False, f"{name}: {'left' if name in found else 'gone'} {told}")
    for name, value in wanted.items():
        if isinstance(value, Tensor) or found[name] is not value:
            case.equal(found[name], value, f"{name} {told}")


@law(
    EVERYWHERE,
    "stateless",
    "a forward, back or not, in training or evaluation, leaves a part as it was, and gives the same bits again",
    kills="mixer-keeps-its-last-input",
    applies=uncalled,
    examples=5,
)
def stateless(case: Case) -> None:
    x, model = entering(case), case.model
    before = held(model)
    wanted = case.gradients(model, lambda y: call(case, model, y), x)
    model.zero_grad(set_to_none=True)
    same(case, held(model), before, "after a forward and back")
    for training in (True, False):
        model.train(training)
        mode = "training" if training else "evaluation"
        with torch.no_grad():
            case.equal(call(case, model, x), wanted["output"], f"the output again, in {mode}")
        same(case, held(model), before, f"after a forward in {mode}")


@law(
    EVERYWHERE,
    "recomputed",
    "computed again on the way back, as activation checkpointing does, the same gradients to the bit",
    kills="first-forward-differs",
    applies=uncalled,
    examples=5,
)
def recomputed(case: Case) -> None:
    x = entering(case)
    call(case, case.model, x)  # what is drawn is drawn
    wanted = case.gradients(case.model, lambda y: call(case, case.model, y), x)

    def again(y: Tensor) -> Tensor:
        found: Tensor = checkpoint(lambda z: call(case, case.model, z), y, use_reentrant=False)
        return found

    found = case.gradients(case.model, again, x)
    case.equal(sorted(found), sorted(wanted), "what has a gradient")
    for name, each in wanted.items():
        case.equal(found[name], each, f"recomputed, {name}")


@law(
    EVERYWHERE,
    "saved",
    "its state_dict in a model of other values, a copy, and a saved folder read again compute the same bits",
    kills="copy-computes-with-the-old-weights",
    applies=uncalled,
    examples=6,
)
def saved(case: Case) -> None:
    x, model = entering(case), case.model
    # A folder is read with the plugins that are installed.
    installed = current().registry.find_owner(case.subject.component) is not None
    how = case.choice("how", ("copied", "state_dict", "folder") if installed else ("copied", "state_dict"))
    with torch.no_grad():
        wanted = call(case, model, x)
        if how == "copied":
            other = deepcopy(model)
        elif how == "state_dict":
            other = build(case.spec, seed=case.draw.values["seed"] + 1)
            other.load_state_dict(model.state_dict())
        else:
            with tempfile.TemporaryDirectory() as folder:
                save(model, Path(folder) / "saved")
                other = load(Path(folder) / "saved")
        for tensor in model.state_dict().values():
            tensor.zero_()
        case.equal(call(case, other, x), wanted, f"{how}, and the first model's tensors zeros")


@law(
    EVERYWHERE,
    "cast",
    "a cast of the model leaves what is declared in a dtype of its own as it is, and casts all else",
    kills="cast-rounds-the-bias",
    applies=uncalled,
    examples=5,
)
def cast(case: Case) -> None:
    declared = case.spec.plan.tensors
    for dtype in (torch.bfloat16, torch.float64):
        model = deepcopy(case.model).to(dtype)
        built = model.state_dict()
        for name, before in case.model.state_dict().items():
            weight = declared.get(case.spec.plan.aliases.get(name, name))
            if weight is not None and weight.dtype is None and before.is_floating_point():
                case.equal(built[name].dtype, dtype, f"the dtype of {name}, cast")
            else:
                case.equal(built[name], before, f"{name} in a model that is cast")


@law(
    EVERYWHERE,
    "seed",
    "initial values follow from the seed alone: the same again, others for another, whatever else is drawn",
    kills="initial-values-of-the-process",
    applies=uncalled,
    examples=5,
)
def seed(case: Case) -> None:
    number = case.integer("seed", 0, 2**16)
    plan, default = case.spec.plan, torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = build(case.spec, seed=number).state_dict()
        case.equal(torch.get_rng_state(), state, "the process's own generator")
        torch.manual_seed(2)
        torch.set_default_dtype(torch.float64)
        try:
            second = build(case.spec, seed=number).state_dict()
        finally:
            torch.set_default_dtype(default)
        other = build(case.spec, seed=number + 1).state_dict()
    for name, value in first.items():
        case.equal(second[name], value, f"{name} by the same seed")
        drawn = name in plan.tensors and not isinstance(plan.tensors[name].init, Constant)
        if drawn and value.is_floating_point():
            case.require(not torch.equal(other[name], value), f"{name} is the same by another seed")


@law(
    EVERYWHERE,
    "initial",
    "initial values have the mean and deviation that are declared, and no two tensors, nor groups of one, the same",
    kills="groups-start-alike",
    applies=uncalled,
    examples=4,
)
def initial(case: Case) -> None:
    """All draws together, of deviation 1 where each is divided by its own: their sum and the sum of their squares stay
    within the bounds of Laurent and Massart (2000, lemma 1) but for once in 10^17.
    """
    built, drawn = build(case.spec, seed=case.integer("seed", 0, 2**16)).state_dict(), []
    for name, weight in case.spec.plan.tensors.items():
        value = built.get(name)
        if value is None or not value.is_floating_point() or name in case.spec.plan.aliases:
            continue
        std = case.spec.model.init_std if weight.init is None else getattr(weight.init, "std", 0.0)
        if isinstance(weight.init, Constant):
            # In fp32, as all initial values, whatever they are cast to.
            wanted = torch.full(value.shape, weight.init.value, dtype=torch.float32).to(value.dtype)
            case.equal(value, wanted, f"{name}, which starts as a constant")
        if not std:
            continue
        groups = value.double() / std if value.ndim == 3 else value.double()[None] / std
        drawn += [(f"{name} ({number})", group.flatten()) for number, group in enumerate(groups)]
    long = [each for each in drawn if len(each[1]) >= DISTINCT]
    for (one, first), (two, second) in combinations(long, 2):
        alike = len(first) == len(second) and torch.equal(first, second)
        case.require(not alike, f"{one} and {two} start with the same values")
    if drawn:
        every = torch.cat([each for _, each in drawn])
        number, error = len(every), roundoff(case.dtype)
        far = 2 * sqrt(number * TAIL) + 2 * TAIL + 3 * number * error
        case.within(abs(float(every.square().sum()) - number), far, "the sum of squares")
        case.within(abs(float(every.sum())), sqrt(2 * TAIL * number) + number * error, "the sum")


@law(
    EVERYWHERE,
    "trained",
    "every tensor that trains gets a gradient, finite, and so does what enters",
    kills="keys-are-detached",
    applies=uncalled,
    examples=5,
)
def trained(case: Case) -> None:
    x = entering(case)
    found = case.gradients(case.model, lambda y: call(case, case.model, y), x)
    nodes = [node for root in entered(case) for node in root.walk()]
    names = {weight.same_as or name for node in nodes for name, weight in node.tensors() if weight.trains}
    if x.is_floating_point():
        names.add("input")
    for name in sorted(names):
        case.require(name in found, f"{name} has no gradient")
    for name, each in found.items():
        case.finite(each, f"the gradient of {name}" if name != "output" else "the output")


@law(
    EVERYWHERE,
    "slope",
    "gradients are the derivatives of what is computed",
    kills="queries-have-half-their-gradient",
    claimed=True,
    applies=uncalled,
    examples=5,
)
def slope(case: Case) -> None:
    x = entering(case)
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        ramp = torch.linspace(-1, 1, call(case, case.judge, x).numel(), dtype=torch.float64)
    differences(
        case, lambda y: (call(case, case.judge, y).flatten() * ramp).sum(), x, "the slope along a direction"
    )
