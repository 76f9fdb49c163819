"""Laws of whole models: tokens that are drawn have the model's distribution behind the filters of the sampling."""

import attrs
import torch

from composeformer.generation import generate
from composeformer.testing.drawn_tokens import allowed, fair, functions, sampling_of
from composeformer.testing.models import ModelCase, model_law

COPIES, NEW = 96, 6


@model_law(
    "sampled",
    "drawn tokens have the model's distribution behind the filters; equal prompts draw apart, and each by itself",
    kills="temperature-multiplies",
    examples=10,
)
def sampled(case: ModelCase) -> None:
    model, sampling = case.model, sampling_of(case)
    prompt = case.integers("prompt", 0, case.spec.model.vocab_size - 1, 1, 3)
    made = generate(model, [prompt] * COPIES, max_new_tokens=NEW, sampling=sampling)
    texts, length = torch.tensor([[*prompt, *each.ids] for each in made]), len(prompt)
    with torch.no_grad():
        p = allowed(model(texts, predict=False).logits[:, length - 1 : -1], sampling)
    ids = texts[:, length:]
    # A row is a bet on the next one, and on that of another seed.
    before = torch.zeros_like(p).scatter(-1, ids.roll(1, 0)[..., None], 1.0)
    before[0] = 0
    again = generate(
        model, [prompt] * COPIES, max_new_tokens=NEW, sampling=attrs.evolve(sampling, seed=sampling.seed + 1)
    )
    of_others = torch.tensor([each.ids for each in again])
    others = torch.zeros_like(p).scatter(-1, of_others[..., None], 1.0)
    bets = {"the token of the row before": before, "the token of another seed": others}
    fair(case, ids, p, {**functions(p), **bets}, "without drafts")
    few = case.integer("few", 1, 3)
    beside = [[*prompt, *prompt]] if case.boolean("beside another") else []
    alone = generate(model, [*beside, *[prompt] * few], max_new_tokens=NEW, sampling=sampling)
    told = "the texts of the first rows, of fewer"
    case.equal([each.ids for each in alone[len(beside) :]], [each.ids for each in made[:few]], told)
