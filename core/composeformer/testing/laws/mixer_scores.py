"""Laws that attention claims: outputs are means of what single tokens give, by weights that scores decide.

Caps and sinks are held to their limits, where they are nothing, or all.

Shapes: B rows, T tokens, D hidden size.
"""

from math import log
from typing import Any

import torch
from torch import Tensor

from composeformer.assemble import in_dtype
from composeformer.decoder import Model
from composeformer.spec.scanner import dotted
from composeformer.testing.case import Case, without_choices
from composeformer.testing.law import law
from composeformer.testing.mixing import length, mix

FAR, NEAR = 2.0**30, 2.0**-60  # beyond any score; below the differences of scores that make a difference


def settled_alone(case: Case, tokens: int) -> Tensor:
    """A row of tokens (1, T, D), settled for each by itself. Sinks are refused: they take weight."""
    if getattr(case.config, "sinks", False):
        case.draw.reject("sinks take weight")
    x = case.stream("x", 1, tokens)
    case.settle(lambda model, y: alone(case, model, y), x)
    return x


def alone(case: Case, model: Model, x: Tensor) -> Tensor:
    """What each token of a row (1, T, D) gives by itself."""
    return mix(case, model, x.transpose(0, 1)).transpose(0, 1)


def changed(case: Case, **values: Any) -> Model:
    """The case's model with fields of its mixer set anew, by reference implementations; its values are kept."""
    (path, *_) = case.node.part.paths
    spec = in_dtype(case.spec_of(without_choices(case.data)), case.spec.formats.activations)
    model = case.built(spec.with_({dotted((*path, name)): value for name, value in values.items()}))
    model.load_state_dict(case.model.state_dict(), strict=False)
    return model


@law(
    "mixer",
    "averages",
    "among equal tokens each is as it is alone, at any positions: weights add up to one, and values do not turn",
    kills="values-are-rotated",
    claimed=True,
    examples=8,
)
def averages(case: Case) -> None:
    tokens = length(case, "tokens", 2)
    x = settled_alone(case, 1)
    with torch.no_grad():
        wanted, found = mix(case, case.model, x), mix(case, case.model, x.expand(1, tokens, -1))
    case.close(found, wanted.expand_as(found), "equal tokens and one alone", terms=tokens)


@law(
    "mixer",
    "cap",
    "a `cap` beyond all scores is none; one below their differences makes every token count alike",
    kills="cap-is-not-divided-by",
    claimed=True,
    examples=8,
)
def cap(case: Case) -> None:
    if getattr(case.config, "cap", None) is not None:
        case.draw.reject("it has a cap already")
    tokens = length(case, "tokens", 2)
    x = settled_alone(case, tokens)
    reach = getattr(case.config, "window", None) or tokens
    with torch.no_grad():
        case.close(
            mix(case, changed(case, cap=FAR), x), mix(case, case.model, x), "a cap far off", terms=tokens
        )
        found, single = mix(case, changed(case, cap=NEAR), x), alone(case, case.model, x)
    means = [single[0, max(0, place + 1 - reach) : place + 1].double().mean(0) for place in range(tokens)]
    case.close(found[0], torch.stack(means), "a cap of almost nothing, beside the mean", terms=tokens)


@law(
    "mixer",
    "sinks",
    "`sinks` far below all scores are none, far above they take all weight; n equal tokens count as one with ln n less",
    kills="sinks-give-back-their-weight",
    claimed=True,
    examples=8,
)
def sinks(case: Case) -> None:
    tokens = length(case, "tokens", 2)
    x = settled_alone(case, tokens)
    model = changed(case, sinks=True)
    logits = case.part_of(model).sinks
    with torch.no_grad():
        logits.fill_(-FAR)
        case.close(mix(case, model, x), mix(case, case.model, x), "sinks far below", terms=tokens)
        logits.fill_(FAR)
        case.equal(mix(case, model, x), mix(case, model, 2 * x), "sinks far above: twice the tokens")
        logits.copy_(case.normal("sinks", *logits.shape, dtype=torch.float64))
        one = mix(case, model, x[:, :1])
        count = min(tokens, getattr(case.config, "window", None) or tokens)
        logits.add_(log(count))
        still = torch.zeros(1, count, dtype=torch.int64)
        found = mix(case, model, x[:, :1].expand(1, count, -1), positions=still)[:, -1:]
    case.close(found, one, f"{count} equal tokens, sinks higher by the logarithm", terms=tokens)
