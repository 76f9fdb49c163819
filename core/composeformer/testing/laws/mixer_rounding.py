"""Laws that attention claims which computes scores, weights and sums in float32 or wider, whatever its values are in.

The bound of two right computations in bfloat16 allows for a rounding of the weights. Here nothing else rounds: values
that are all equal are numbers of bfloat16, and so is their mean, unless weights that were rounded do not add up to one;
scores of equal size that are rounded lose what tells tokens apart.

Shapes: B rows, T tokens, D hidden size, H heads, V features of a value.
"""

from math import sqrt

import torch
from torch import Tensor

from composeformer.assemble import build, in_dtype
from composeformer.errors import SpecError
from composeformer.testing.bounds import SAFETY, roundoff
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.mixer_closed import attended, grouped
from composeformer.testing.maps import Bounded, near
from composeformer.testing.mixing import mix

NARROW = "bfloat16"
ROWS, LONGEST = 8, 64
# So many times the weights that add up to one round to something else by most of a unit of bfloat16.
WORST = 0.75


def narrowed(case: Case) -> None:
    """Puts the case into bfloat16. One whose implementation does not serve there is rejected."""
    narrow = in_dtype(case.spec, NARROW)
    try:
        build(narrow, device="meta")
    except SpecError as error:
        case.draw.reject(str(error.problems[0]))
    case.spec = narrow


def uneven() -> list[int]:
    """Numbers n whose n-th is far from a number of bfloat16."""
    unit = roundoff(torch.bfloat16)
    return [n for n in range(2, LONGEST) if abs(n * float(torch.tensor(1 / n).bfloat16()) - 1) > WORST * unit]


@law(
    "mixer",
    "even",
    "in bfloat16 n equal tokens at one position are as one alone, with no rounding between: weights are wider",
    kills="weights-in-bfloat16",
    claimed=True,
    examples=8,
)
def even(case: Case) -> None:
    """Only sums of the map behind may fall to the other side of the middle between two numbers."""
    if getattr(case.config, "sinks", False):
        case.draw.reject("sinks take weight")
    narrowed(case)
    counts = [n for n in uneven() if n <= (getattr(case.config, "window", None) or LONGEST)]
    if not counts:
        case.draw.reject("the window is short")
    tokens = case.choice("tokens", counts)
    x = case.stream("x", ROWS, 1).expand(ROWS, tokens, -1)
    still = torch.full((ROWS, tokens), case.integer("position", 0, 40))
    with torch.no_grad():
        y = mix(case, case.model, x, positions=still)
    differ = int((y[:, -1] != y[:, 0]).sum())
    case.finite(y, "the output")
    case.within(
        float(differ), SAFETY, f"numbers of {y[:, 0].numel()} that are others among {tokens} equal tokens"
    )


@law(
    "mixer",
    "scores",
    "in bfloat16 large scores that differ by little are told apart: between queries, keys and values and their mean"
    " nothing is rounded but weights",
    kills="scores-in-bfloat16",
    claimed=True,
    examples=8,
)
def scores(case: Case) -> None:
    """Of the part's own maps, as they are rounded: what enters the map `o` is compared, by element. Weights may be
    rounded once, and the mean. The first feature is that of all tokens, and makes most of every score.
    """
    narrowed(case)
    part, tokens = case.part, case.integer("tokens", 2, LONGEST // 4)
    x = case.stream("x", 1, tokens)
    x[..., 0] = 1
    still = torch.full((1, tokens), case.integer("position", 0, 40))
    heard: list[Tensor] = []
    hook = part.o.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    with torch.no_grad():
        for linear in (part.q, part.k):
            linear.weight[:, 0] *= 2.0 ** case.integer("power", 0, 5) if linear is part.q else 8.0
        mix(case, case.model, x, positions=still)
        hook.remove()
        q, k, v = grouped(case.config, part, x, case.model.rotary(still)[part.position.key])
        scale, sinks = case.config.head_dim**-0.5, getattr(part, "sinks", None)
        wanted = attended(case.config, q, k, v, scale, sinks).flatten(1)
        sizes = attended(case.config, q, k, v.abs(), scale, sinks).flatten(1)
        largest = float((q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * scale)
    wide = SAFETY * sqrt(q.shape[-1] + tokens) * roundoff(torch.float32) * (1 + largest)
    unit = roundoff(torch.bfloat16)
    bound = unit * (wanted.abs() + sizes) + 2 * wide * sizes + torch.finfo(torch.bfloat16).tiny
    near(case, heard[0][0], Bounded(exact=wanted, bound=bound), f"the mean of the values of {tokens} tokens")
