"""Laws of mixers: what a token sees. Itself and the tokens before it, of its own row and document, padding aside.

Shapes: B rows, T tokens, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from composeformer.contracts import Core
from composeformer.decoder import Model
from composeformer.testing.case import Case
from composeformer.testing.frame import LONGEST
from composeformer.testing.law import law
from composeformer.testing.mixing import length, mix, settled

ROWS, ROOM = 3, 5


@law(
    "mixer",
    "causal",
    "a later token changes no earlier output",
    kills="mask-lets-the-next-token-in",
    examples=12,
)
def causal(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 2), length(case, "tokens", 2)
    changed = case.integer("changed", 1, tokens - 1)
    told = _positions(case, rows, tokens)
    x = settled(case, rows, tokens, **told)
    y = x.clone()
    y[:, changed:] = 10 * case.stream("y", rows, tokens - changed)
    with torch.no_grad():
        before, after = mix(case, case.model, x, **told), mix(case, case.model, y, **told)
    case.close(after[:, :changed], before[:, :changed], "outputs before the changed token", terms=tokens)
    cotangent = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape).clone()
    cotangent[:, changed:] = 0
    found = case.gradients(case.model, lambda y: mix(case, case.model, y, **told), x, cotangent)
    reached = found["input"]
    none = {"input": torch.zeros_like(reached[:, changed:])}
    told_of = "gradient of earlier outputs at a later token"
    case.close({"input": reached[:, changed:]}, none, told_of, terms=tokens, scale=float(reached.abs().max()))


def _positions(case: Case, rows: int, tokens: int) -> dict[str, Any]:
    """Positions that are given, in any order, or none."""
    if not case.boolean("positions given"):
        return {}
    generator = torch.Generator().manual_seed(0)
    return {"positions": torch.randint(min(2 * tokens, LONGEST), (rows, tokens), generator=generator)}


def together_as_apart(case: Case, x: Tensor, numbers: Tensor, real: Tensor, **told: Any) -> None:
    """Outputs at `real` tokens (B, T), and all gradients, are those of each document of each row alone, by `numbers`
    (B, T). The others are NaN; `told` is what the model is told of both.
    """
    places = real.nonzero(as_tuple=True)

    def together(model: Model, y: Tensor) -> Tensor:
        return mix(case, model, y, **told)[places]

    def apart(y: Tensor) -> Tensor:
        outputs = torch.zeros_like(y)
        for row in range(len(y)):
            for number in set(numbers[row].tolist()):
                own = (real[row] & (numbers[row] == number)).nonzero()[:, 0]
                if len(own):
                    alone = mix(case, case.model, y[row, own][None])[0]
                    outputs = outputs.index_put((torch.tensor(row), own), alone)
        return outputs[places]

    clean, spoilt = (x.masked_fill(~real[..., None], value) for value in (0, torch.nan))
    case.settle(together, clean)
    wanted = case.gradients(case.model, apart, clean)
    found = case.gradients(case.model, lambda y: together(case.model, y), spoilt)
    case.close(found, wanted, "together, and apart", terms=x.shape[0] * x.shape[1])


@law("mixer", "rows", "each row is as it is alone", kills="rows-share-a-softmax", examples=8)
def rows(case: Case) -> None:
    rows, tokens = case.integer("rows", 2, ROWS), length(case, "tokens")
    x = case.stream("x", rows, tokens)
    whole = torch.ones(rows, tokens, dtype=torch.bool)
    together_as_apart(case, x, whole.long(), whole)


@law(
    "mixer",
    "padding",
    "padding changes nothing, wherever it stands and whatever is in it",
    kills="padding-is-multiplied-by-zero",
    examples=12,
)
def padding(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 2), length(case, "tokens", 2)
    valid = torch.ones(rows, tokens, dtype=torch.bool)
    for row in range(rows):
        valid[row, case.integers(f"padding {row}", 0, tokens - 1, 0, tokens)] = False
    if not valid.any():
        valid[-1, case.integer("real", 0, tokens - 1)] = True
    x = case.stream("x", rows, tokens)
    together_as_apart(case, x, torch.zeros(valid.shape, dtype=torch.int64), valid, valid=valid)


@law(
    "mixer", "documents", "packed documents do not see each other", kills="documents-are-ignored", examples=8
)
def documents(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 2), length(case, "tokens", 2)
    starts = torch.zeros(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        starts[row, case.integers(f"starts {row}", 1, tokens - 1)] = 1
    valid = torch.ones(rows, tokens, dtype=torch.bool)
    told: dict[str, Any] = {}
    if case.boolean("padded"):
        valid[:, case.integers("padding", 0, tokens - 1, 1, tokens - 1)] = False
        told = {"valid": valid}
    x = case.stream("x", rows, tokens)
    numbers = starts.cumsum(1)
    together_as_apart(case, x, numbers, valid, documents=numbers, **told)


def window_of(case: Case) -> int | None:
    """The window that the part's config states, if it has such a field."""
    found: int | None = getattr(case.config, "window", None)
    return found


def reached(case: Case, x: Tensor) -> Tensor:
    """How much the last output depends on each token (T) of a row x (1, T, D): the largest of its gradient."""
    cotangent = torch.zeros(x.shape, dtype=torch.float64)
    cotangent[:, -1] = torch.linspace(0.5, 1.5, x.shape[2], dtype=torch.float64)
    found = case.gradients(case.model, lambda y: mix(case, case.model, y), x, cotangent)
    return found["input"][0].abs().amax(-1)


@law(
    "mixer",
    "sees",
    "a token depends on itself and on each token before it, in its window if there is one",
    kills="window-is-one-too-short",
    claimed=True,
    examples=8,
)
def sees(case: Case) -> None:
    tokens = length(case, "tokens", 2)
    found = reached(case, case.stream("x", 1, tokens))
    case.finite(found, "a gradient")
    reach = min(window_of(case) or tokens, tokens)
    for back, each in enumerate(found.flip(0)[:reach].tolist()):
        case.require(each > 0, f"the last of {tokens} tokens does not depend on the one {back} before it")


@law(
    "mixer",
    "window",
    "a token `window` back, and all before it, change nothing",
    kills="window-is-one-too-long",
    claimed=True,
    examples=8,
)
def window(case: Case) -> None:
    wide = window_of(case)
    if wide is None:
        case.draw.reject("there is no window")
    for each in case.config.cost(case.node.site, "train"):
        if isinstance(each, Core):
            case.equal(each.window, wide, f"the window of what {each.name} costs")
    tokens = wide + case.integer("beyond", 1, ROOM)
    found = reached(case, settled(case, 1, tokens))
    beyond = found[: tokens - wide]
    told = "gradient of the last output beyond its window"
    scale = float(found.max())
    case.close({"input": beyond}, {"input": torch.zeros_like(beyond)}, told, terms=tokens, scale=scale)
