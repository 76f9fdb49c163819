"""Laws of mixers about positions: they rotate, and say nothing of what is seen.

Shapes: B rows, T tokens, D hidden size.
"""

import torch
from torch import Tensor

from composeformer.decoder import Model
from composeformer.testing.bounds import SAFETY, gap, roundoff, size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.mixing import FARTHEST, length, mix, settled


@law(
    "mixer",
    "set",
    "a token sees a set: those before it may stand in any order, with their positions",
    kills="keys-grow-with-their-place",
    claimed=True,
    examples=8,
)
def a_set(case: Case) -> None:
    tokens = min(length(case, "tokens", 2), getattr(case.config, "window", None) or FARTHEST)
    generator = torch.Generator().manual_seed(case.integer("order", 0, 2**16))
    order = torch.cat([torch.randperm(tokens - 1, generator=generator), torch.tensor([tokens - 1])])
    positions = torch.randint(FARTHEST, (1, tokens), generator=generator)
    x = settled(case, 1, tokens, positions=positions)
    with torch.no_grad():
        wanted = mix(case, case.model, x, positions=positions)[:, -1]
        found = mix(case, case.model, x[:, order], positions=positions[:, order])[:, -1]
    case.close(found, wanted, "the last of tokens in another order", terms=tokens)


@law(
    "mixer",
    "relative",
    "positions that all move on alike change nothing, where each turns pairs of features by an angle for every step",
    kills="keys-are-not-rotated",
    claimed=True,
    examples=8,
)
def relative(case: Case) -> None:
    tokens, moved = length(case, "tokens", 2), case.integer("moved", 1, FARTHEST)
    positions = torch.arange(tokens)[None]
    if not turns_evenly(case.model, positions, moved):
        case.draw.reject("its positions do not turn evenly")
    x = settled(case, 1, tokens)
    with torch.no_grad():
        wanted = mix(case, case.model, x, positions=positions)
        found = mix(case, case.model, x, positions=positions + moved)
    # Tables are in float32, and an angle is off by its own size times the roundoff.
    angles = SAFETY * (tokens + moved) * roundoff(torch.float32)
    bound = (case.terms.plus(tokens).error(case.dtype) + angles) * case.condition.output * size(wanted)
    case.within(gap(found, wanted), bound, f"outputs with all positions {moved} further on")


def turns_evenly(model: Model, positions: Tensor, moved: int) -> bool:
    """Whether all rotary tables of a model turn by the same angle between any two positions `moved` apart."""
    here, there = model.rotary(positions), model.rotary(positions + moved)
    for key, (cos, sin) in here.items():
        turned = cos * there[key].cos + sin * there[key].sin
        if float((turned - turned[:, :1]).abs().amax(dim=(0, 1, 2)) if turned.numel() else 0) > EVEN:
            return False
    return True


EVEN = 1e-3  # far above rounding, far below what other tables are apart
