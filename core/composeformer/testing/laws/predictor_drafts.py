"""Laws of predictors that draft: whatever was drafted, taken and forgotten, a draft is what a full forward says.

Shapes: B rows, T tokens, N new positions of a call, V vocabulary.
"""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from composeformer.generation import generate
from composeformer.testing.bounds import size, terms_of
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.predictor import predicted, settled, widened

ROWS = 2
# Of each call of `draft`: its columns, which of them are real in each row (bits), which rows' drafts are right (bits).
BITS = st.integers(0, 15)
RIGHT = st.sampled_from([0b11, 0b01, 0b10, 0b00])
SOME = st.lists(st.tuples(st.integers(1, 3), BITS, BITS, RIGHT), min_size=3, max_size=8)
# One row rests, as long as it may become, while the other goes on.
RESTS = st.just([(7, 0b1111111, 0b0111111, 0b11), (1, 0b0, 0b1, 0b11)])
CALLS = SOME | SOME | RESTS


@law(
    "predictor",
    "drafts",
    "drafting from caches, in any pieces, after right and wrong drafts, says what a full forward says",
    kills="predictor-keeps-wrong-drafts",
    examples=25,
)
def drafts(case: Case) -> None:
    drawn = case.draw("calls", CALLS)
    widened(case)
    if not hasattr(case.part, "draft"):
        return
    ids = settled(case, ROWS, 8, 12)
    part, tokens = case.part, ids.shape[1]
    place = [0] * ROWS
    with torch.no_grad():
        full = predicted(case.model, ids)
        cache: Any = part.new_cache(ROWS, sum(width for width, *_ in drawn))
        for width, *masks, right in drawn:
            real = columns(width, masks, [tokens - 1 - at for at in place])
            if not bool(real.any()):
                continue
            hidden = torch.full((*real.shape, case.node.site.width), 7.0, dtype=case.dtype)
            following = torch.zeros_like(real, dtype=torch.int64)
            for row, column in real.nonzero().tolist():
                hidden[row, column] = full.hidden[row, place[row]]
                following[row, column] = ids[row, place[row] + 1]
                place[row] += 1
            spoken: list[Tensor] = []

            def choose(k: int, logits: Tensor, right: int = right, spoken: list[Tensor] = spoken) -> Tensor:
                """The tokens that follow, in rows whose drafts are right; others where they are wrong."""
                spoken.append(logits)
                taken = (logits.argmax(-1) + 1) % logits.shape[-1]
                for row in range(ROWS):
                    if right >> row & 1 and place[row] + k + 1 < tokens:
                        taken[row] = ids[row, place[row] + k + 1]
                return taken

            valid = None if bool(real.all()) else real
            made = part.draft(hidden, following, valid, cache, case.model.rotary, choose)
            case.equal(made.shape, (ROWS, part.num_drafts), "the shape of the drafts")
            for row in real.any(1).nonzero()[:, 0].tolist():
                # What follows a wrong draft is said of another text.
                for k, prediction in enumerate(full.predictions[: None if right >> row & 1 else 1]):
                    if place[row] + k < tokens - 1:
                        wanted = prediction.logits[row, place[row] - 1]
                        told = f"draft {k + 1} of row {row} after {place[row]} tokens"
                        case.close(spoken[k][row], wanted, told, scale=size(prediction.logits), terms=tokens)


def columns(width: int, masks: list[int], left: list[int]) -> Tensor:
    """Which of a call's columns are real (B, N), no more than are left of each row."""
    real = torch.tensor([[bool(mask >> column & 1) for column in range(width)] for mask in masks])
    for row, most in enumerate(left):
        real[row] &= real[row].cumsum(0) <= most
    return real


@law(
    "predictor",
    "speculative",
    "greedy text with drafts is greedy text without, where no two logits are within rounding",
    kills="predictor-drafts-are-taken-unseen",
    examples=8,
)
def speculative(case: Case) -> None:
    widened(case)
    if not hasattr(case.part, "draft"):
        return
    prompts = [case.integers(f"prompt {row}", 0, case.spec.model.vocab_size - 1, 1, 4) for row in range(ROWS)]
    more = case.integer("more", 2, 10)
    model = case.model.eval()
    plain = generate(model, prompts, max_new_tokens=more)
    for prompt, made in zip(prompts, plain, strict=True):
        text = torch.tensor([[*prompt, *made.ids]])
        case.settle(lambda model, ids: model(ids, predict=False).logits, text)
        with torch.no_grad():
            logits = model(text, predict=False).logits[0, len(prompt) - 1 : -1].double()
        best = logits.topk(min(2, logits.shape[-1])).values
        error = (
            terms_of(*case.spec.plan.nodes()).plus(text.shape[1]).error(case.dtype) * case.condition.output
        )
        if float((best[:, 0] - best[:, -1]).min()) <= 2 * error * size(logits):
            case.draw.reject("two logits are within rounding")
    found = generate(model, prompts, max_new_tokens=more, speculate=True)
    for row, (one, other) in enumerate(zip(found, plain, strict=True)):
        case.equal(list(one.ids), list(other.ids), f"the text of row {row}")
