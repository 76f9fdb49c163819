"""Laws of predictors outside of training: they rest unless asked, and what they draft leaves the text the model's own.

Shapes: B rows, T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from composeformer.generation import generate
from composeformer.testing.bounds import size
from composeformer.testing.case import Case
from composeformer.testing.drawn_tokens import allowed, fair, functions, sampling_of
from composeformer.testing.law import law
from composeformer.testing.laws.predictor import predicted, widened

ROWS = 2
COPIES, NEW = 256, 8


@law(
    "predictor",
    "rests",
    "it is run in training alone, unless it is asked: not in evaluation, by a cache, or in a phase of serving",
    kills="predictor-runs-in-evaluation",
    examples=5,
)
def rests(case: Case) -> None:
    ids = case.ids("ids", case.integer("rows", 1, 2), case.integer("tokens", 2, 6))
    model, part = case.model, case.part
    calls: list[int] = []
    hook = part.register_forward_hook(lambda *_: calls.append(1))
    ways: dict[str, dict[str, Any]] = {
        "evaluation": {},
        "prefill": {"phase": "prefill"},
        "decoding": {"phase": "decode"},
        "a forward through a cache": {"cache": model.new_cache(*ids.shape)},
        "training without predictions": {"predict": False, "phase": "train"},
    }
    with torch.no_grad():
        for way, told in ways.items():
            model.train(way != "evaluation")
            output = model(ids, **told)
            case.equal(len(output.predictions), 0, f"predictions in {way}")
            for field in output.aux._fields:
                own = [path for path in getattr(output.aux, field) if path.startswith("predictor")]
                case.equal(own, [], f"{field} of the predictor in {way}")
            case.equal(len(calls), 0, f"runs of the predictor in {way}")
        model.train()
        case.require(model(ids).predictions, "in training there are no predictions")
    hook.remove()


@law(
    "predictor",
    "continues",
    "each forward of a generation with drafts goes on from the text as it stands, and sees it and no wrong draft",
    kills="speculation-forgets-one-too-few",
    examples=8,
)
def continues(case: Case) -> None:
    """Before each forward the cache is as long as the text but for what is fed, which is the text up to a wrong draft;
    there the logits are those of the text alone.
    """
    widened(case)
    if not hasattr(case.part, "draft"):
        return
    prompts = [case.integers(f"prompt {row}", 0, case.spec.model.vocab_size - 1, 1, 4) for row in range(ROWS)]
    model = case.model.eval()
    options: dict[str, Any] = {"sampling": sampling_of(case)} if case.boolean("drawn") else {}
    lengths: list[Tensor] = []
    heard: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(_: Any, given: Any, named: dict[str, Any]) -> None:
        lengths.append(named["cache"].lengths.clone())

    def after(_: Any, given: Any, named: dict[str, Any], output: Any) -> None:
        ids, valid = given[0], named["valid"]
        real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        heard.append((ids, real, output.logits.clone()))

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        made = generate(model, prompts, max_new_tokens=case.integer("more", 3, 10), speculate=True, **options)
    finally:
        for hook in hooks:
            hook.remove()
    for row, (prompt, one) in enumerate(zip(prompts, made, strict=True)):
        text = torch.tensor([[*prompt, *one.ids]])
        case.settle(lambda model, ids: model(ids, predict=False).logits, text)
        with torch.no_grad():
            whole = model(text, predict=False).logits[0]
        for number, (start, (ids, real, logits)) in enumerate(zip(lengths, heard, strict=True)):
            at, fed = int(start[row]), ids[row, real[row]]
            same = fed[: text.shape[1] - at] == text[0, at : at + len(fed)]
            right = int(same.long().cumprod(0).sum())
            told = f"forward {number}, row {row}, of {at} tokens"
            case.require(
                right or not len(fed), f"{told}: is fed {fed.tolist()}, the text is {text[0].tolist()}"
            )
            given = logits[row, real[row]] if logits.shape[1] == ids.shape[1] else logits[row]
            found, wanted = given[: right - len(fed) or None], whole[at + len(fed) - len(given) : at + right]
            if len(wanted):
                case.close(found, wanted, told, scale=size(whole), terms=text.shape[1])


@law(
    "predictor",
    "sampled",
    "tokens that are drawn with drafts have the model's own distribution, whatever the drafts'",
    kills="every-drawn-draft-is-taken",
    examples=5,
)
def sampled(case: Case) -> None:
    widened(case)
    if not hasattr(case.part, "draft"):
        return
    prompt = case.integers("prompt", 0, case.spec.model.vocab_size - 1, 1, 3)
    sampling, model = sampling_of(case), case.model.eval()
    made = generate(model, [prompt] * COPIES, max_new_tokens=NEW, sampling=sampling, speculate=True)
    texts, length = torch.tensor([[*prompt, *each.ids] for each in made]), len(prompt)
    with torch.no_grad():
        output = predicted(model, texts)
    # Of the tokens that were drawn.
    p, ids = allowed(output.logits[:, length - 1 : -1], sampling), texts[:, length:]
    fair(case, ids, p, functions(p), "with drafts")
    for depth, each in enumerate(output.predictions, 1):
        # The first token has no draft; those of a depth begin where its own tokens are behind it.
        first = max(length + 1, depth + 1)
        q = allowed(each.logits[:, first - depth - 1 : -1], sampling)
        own = p[:, first - length :]
        more = {"tokens that drafts have more often than the model": (q > own).double()}
        fair(case, texts[:, first:], own, more, f"depth {depth}")
