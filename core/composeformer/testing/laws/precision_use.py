"""Laws of precision policies: a map gives the same however it is called, and every option is one.

Shapes: N rows, I inputs, O outputs, E groups.
"""

from copy import deepcopy
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from composeformer import lazy
from composeformer.config import facts_of
from composeformer.errors import ComposeError
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.maps import ROLE, Bounded, Maps, near, serves_cpus, unserved

of_maps = partial(law, "precision", applies=serves_cpus)


@of_maps(
    "modes",
    "without gradients, and in rows of any shape, a map gives the same; twice it gives the same bits",
    kills="noise-in-training",
    examples=10,
)
def modes(case: Case) -> None:
    maps = Maps(case)
    linear = maps.linear()
    once, twice = maps.run(linear), maps.run(linear)
    for name, each in once.items():
        case.equal(twice[name], each, f"{name}, again")
    bound = maps.bounded(linear.dtype, same=True)["output"].bound
    wanted = Bounded(exact=once["output"].double(), bound=bound)
    linear.train(not case.boolean("evaluated"))
    mode = torch.no_grad() if case.boolean("no_grad") else torch.inference_mode()
    with mode:
        near(case, linear(maps.x, *maps.offsets(maps.ends)), wanted, "without gradients")
        if maps.ends is None:
            near(case, linear(maps.x[None, :, None])[0, :, 0], wanted, "in three dimensions")
        near(case, deepcopy(linear)(maps.x, *maps.offsets(maps.ends)), wanted, "of a copy")


@of_maps(
    "calls",
    "a map may be called again before its gradients are asked for, with numbers in any order in memory",
    kills="inputs-kept-on-the-module",
    examples=10,
)
def calls(case: Case) -> None:
    maps = Maps(case)
    linear = maps.linear()
    once, bounds = maps.run(linear), maps.bounded(linear.dtype, same=True)
    wanted = {name: Bounded(exact=each.double(), bound=bounds[name].bound) for name, each in once.items()}
    x = maps.x.mT.contiguous().mT.requires_grad_()
    ends = torch.tensor(maps.ends, dtype=torch.int64) if maps.ends is not None else None
    rest = () if ends is None else (ends,)
    y = linear(x, *rest)
    linear(maps.x.flip(-1), *maps.offsets(maps.ends))
    near(case, y, wanted["output"], "output")
    if "input" not in once:
        return
    linear.zero_grad(set_to_none=True)
    y.backward(maps.cotangent.to(y.dtype).mT.contiguous().mT)
    found: dict[str, Any] = {"input": x.grad, "weight": linear.weight.grad}
    for name in found.keys() & once.keys():
        case.require(found[name] is not None, f"{name} has no gradient")
        near(case, found[name], wanted[name], f"the gradient of the {name}")


@of_maps(
    "frozen",
    "inputs have the same gradient where the weight needs none, and weights where the input needs none",
    kills="frozen-weight-stops-gradients",
    examples=8,
)
def frozen(case: Case) -> None:
    maps = Maps(case)
    linear = maps.linear()
    once, bounds = maps.run(linear), maps.bounded(linear.dtype, same=True)
    cotangent = maps.cotangent.to(linear.dtype)

    def same(name: str, found: Tensor | None) -> None:
        if name in once:
            case.require(found is not None, f"{name} has no gradient")
            wanted = Bounded(exact=once[name].double(), bound=bounds[name].bound)
            near(case, found, wanted, f"the gradient of the {name} alone")  # type: ignore[arg-type]

    if "weight" in once:
        linear.zero_grad(set_to_none=True)
        linear(maps.x, *maps.offsets(maps.ends)).backward(cotangent)
        same("weight", linear.weight.grad)
    if "input" in once:
        linear.requires_grad_(False)
        x = maps.x.clone().requires_grad_()
        linear(x, *maps.offsets(maps.ends)).backward(cotangent)
        same("input", x.grad)


@of_maps(
    "options",
    "each option changes a format, or what is computed, of some map",
    kills="gradients-format-ignored",
    examples=6,
)
def options(case: Case) -> None:
    # Sums that are long enough for their order to show, in an accumulator of another width.
    maps = Maps(
        case,
        groups=False,
        sensitive=False,
        bias=True,
        dtype="float32",
        content="wide",
        rows=(200,),
        inputs=(300,),
        outputs=(33,),
    )
    facts = {name: fact for name, fact in facts_of(type(maps.config)).items() if fact.choices}
    if not facts:
        return
    name = case.choice("option", sorted(facts))
    now = getattr(maps.config, name)
    value = case.choice("instead", [each for each in facts[name].choices or () if each != now])
    other = attrs.evolve(maps.config, **{name: value})
    if unserved(case.subject, other) is not None:
        return
    told = f"{name} = {value!r} instead of {now!r} changes nothing"
    case.require(_differ(maps, _forms(maps), other), told)


def _forms(maps: Maps) -> list[Any]:
    """What a config says of tensors, and what its map computes."""
    weights = maps.declared.weights
    formats = [maps.config.format(ROLE, each, kept) for each in weights for kept in (False, True)]
    return [*formats, maps.config.activations]


def _differ(maps: Maps, before: list[Any], other: Any) -> bool:
    computed = maps.run(maps.linear())
    config, policy = maps.config, maps.policy
    maps.config, maps.policy = other, lazy.load(maps.case.subject.implementation.module)(other)
    maps.__dict__.pop("form", None)
    maps.__dict__.pop("codec", None)
    try:
        if _forms(maps) != before:
            return True
        again = maps.run(maps.linear())
    except ComposeError as error:
        maps.case.draw.reject(str(error))
    finally:
        maps.config, maps.policy = config, policy
    return again.keys() != computed.keys() or any(
        again[name].dtype != each.dtype or not torch.equal(again[name], each)
        for name, each in computed.items()
    )


@of_maps(
    "repeats",
    "a matrix that is taken for the weight is the matrix again",
    kills="scale-with-headroom",
    claimed=True,
    examples=12,
)
def repeats(case: Case) -> None:
    maps = Maps(case, bias=False, rows=(1,))
    m = maps.linear().matrix().detach()
    if maps.stored(m).to(m.dtype).ne(m).any():
        case.draw.reject("what is stored does not hold the matrix")
    case.equal(maps.linear(m.float() if m.dtype != torch.float64 else m).matrix().detach(), m, "the matrix")
