"""An optimizer under test: what it trains, drawn, and the steps that it takes.

The parameters are those of a case's model, or some of them, with what their parts declared of them.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import attrs
import hypothesis
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor, nn
from torch.optim import Optimizer

from composeformer import lazy
from composeformer.contracts import Facts
from composeformer.errors import SpecError
from composeformer.site import Site
from composeformer.spec import Spec, inherit
from composeformer.spec.document import from_data
from composeformer.testing.case import PRECISIONS, Case
from composeformer.testing.frame import frames
from composeformer.testing.subject import Subject
from composeformer.testing.tables import Table
from composeformer.train.roles import Trained
from composeformer.train.trainer import trained

MOMENTS = ("float32", "bfloat16")


@cache
def served(subject: Subject) -> str | None:
    """Why an implementation serves no case on the CPU, by its needs for one that is drawn."""
    needs = subject.implementation.needs
    if needs is None:
        return None
    told: list[str | None] = []

    @settings(
        max_examples=20,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @hypothesis.seed(0)
    @hypothesis.given(frames(subject))
    def one(data: Table) -> None:
        if not told:
            try:
                spec = Spec(inherit.resolve(from_data(data, "case"), None), subject.registry)
            except SpecError:
                return
            config = spec.single(subject.slot).config
            width = spec.model.hidden_size
            site = Site(path=subject.slot, slot=subject.slot, layer=None, width=width, spec=spec)
            reasons = [
                needs(Facts(config=config, site=site, phase="train", device="cpu", dtype=dtype))
                for dtype in PRECISIONS
            ]
            told.append(None if None in reasons else reasons[0])

    one()
    return told[0] if told else "no case could be drawn"


def everything(case: Case) -> list[Trained]:
    """All that the case's model trains, moments in a dtype that is drawn: the weights' own, narrower or wider."""
    moment = case.choice("moment", [None, *MOMENTS])
    return [
        one
        if one.format is None or moment is None
        else one._replace(format=attrs.evolve(one.format, moment=moment))
        for one in trained(case.model)
    ]


def copied(every: Sequence[Trained]) -> list[Trained]:
    """The same with parameters of their own."""
    return [one._replace(parameter=nn.Parameter(one.parameter.detach().clone())) for one in every]


def optimizer(case: Case, every: Sequence[Trained], learning_rate: float, **fields: Any) -> Optimizer:
    """The optimizer of `every`; `fields` replace those of its config."""
    make = lazy.load(case.subject.implementation.module)
    found: Optimizer = make(attrs.evolve(case.config, **fields), every, learning_rate)
    return found


def gradient(case: Case, name: str, step: int, like: Tensor, scale: float = 1.0) -> Tensor:
    """The gradient of a parameter in a step: the same of the same name whoever asks, for a seed that is drawn once."""
    if "gradients" not in case.draw.values:
        case.integer("gradients", 0, 2**16)
    seed = hash_of(f"{case.draw.values['gradients']} {step} {name}")
    random = torch.Generator().manual_seed(seed)
    found = torch.randn(like.shape, generator=random, dtype=torch.float64)
    return (found * scale).to(like.dtype)


def hash_of(text: str) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(text.encode(), "little") % (2**61 - 1)


def run(
    case: Case,
    made: Optimizer,
    every: Sequence[Trained],
    steps: Sequence[int],
    of: Callable[[Trained, int], Tensor | None] | None = None,
) -> None:
    """Takes steps, each with its own gradients, by default `gradient`'s."""
    for step in steps:
        for one in every:
            given = gradient(case, one.name, step, one.parameter) if of is None else of(one, step)
            one.parameter.grad = given
        made.step()


def values(every: Sequence[Trained]) -> dict[str, Tensor]:
    """Copies of what is trained, by name."""
    return {one.name: one.parameter.detach().clone() for one in every}
