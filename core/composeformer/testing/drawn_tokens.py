"""Whether tokens that were drawn have the distribution that they are said to have.

Who bets on each next token at the odds of the model, by any rule that looks at the tokens before it alone, wins as much
as he loses: for any other distributions r the products of r / p along texts are a martingale of mean 1, whatever the
model, and by the inequality of Ville (1939)

    P(sum log r / p >= log 1 / alpha) <= alpha

The bets made here are p itself, tilted: r is p exp(lambda f), divided by its sum, for functions f of a token and those
before it. They win by as much as the mean of f is another than the model's.

Shapes: R texts, N tokens drawn in each, V vocabulary.
"""

from collections.abc import Mapping
from math import log
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from composeformer.generation import Sampling
from composeformer.testing.case import Case

# How often a right model may be told to be wrong; how strong bets are.
RARELY = 2.0**-30
SAMPLINGS: tuple[dict[str, Any], ...] = ({}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2})
TILTS = (-2.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0)


def sampling_of(case: Case) -> Sampling:
    """A sampling with a temperature, and one filter at most."""
    temperature = case.choice("temperature", [1.0, 0.5, 2.0])
    return Sampling(
        temperature=temperature, seed=case.integer("sampling", 0, 2**16), **case.choice("filter", SAMPLINGS)
    )


def allowed(logits: Float[Tensor, "*R V"], sampling: Sampling) -> Float[Tensor, "*R V"]:
    """The probabilities that a sampling with a temperature draws by, in float64: each filter of what the one before it
    left.
    """
    p = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_k is not None and sampling.top_k < p.shape[-1]:
        least = p.topk(sampling.top_k, -1).values[..., -1:]
        p = _of_all(p * (p >= least))
    if sampling.top_p is not None:
        falling, order = p.sort(stable=True, dim=-1, descending=True)
        before = falling.cumsum(-1) - falling
        kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before < sampling.top_p)
        p = _of_all(p * kept)
    if sampling.min_p is not None:
        p = _of_all(p * (p >= sampling.min_p * p.amax(-1, keepdim=True)))
    return p


def _of_all(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True)


def functions(p: Float[Tensor, "R N V"]) -> dict[str, Float[Tensor, "R N V"]]:
    """Functions of a token that tell most wrong ways to draw: is it the likeliest, and at which quantile it stands."""
    best = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
    return {"the likeliest token": best, "the quantile of a token": p.cumsum(-1) - p / 2}


def fair(
    case: Case, ids: Int[Tensor, "R N"], p: Float[Tensor, "R N V"], every: Mapping[str, Tensor], told: str
) -> None:
    """Tokens drawn by p: none of probability zero, and no bet on any of the functions (R, N, V) wins beyond chance."""
    drawn = ids[..., None]
    case.require(bool((p.gather(-1, drawn) > 0).all()), f"{told}: a token that the sampling leaves out")
    bound = log(len(TILTS) * len(every) / RARELY)
    for name, each in every.items():
        for tilt in TILTS:
            odds = tilt * each.gather(-1, drawn)[..., 0] - (p * (tilt * each).exp()).sum(-1).log()
            many = "more" if tilt > 0 else "less"
            case.within(
                max(0.0, float(odds.sum())),
                bound,
                f"{told}: won of a bet on {name}, {many} than by the model",
            )
