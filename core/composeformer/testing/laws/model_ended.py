"""Laws of whole models: where texts end, alone or beside others that go on."""

from typing import Any

from composeformer.generation import generate
from composeformer.testing.drawn_tokens import sampling_of
from composeformer.testing.models import ModelCase, model_law

NEW = 8


@model_law(
    "ended",
    "a text ends behind the first of its end tokens, or where its room ends; others beside it go on as they would",
    kills="end-tokens-are-passed-over",
    examples=12,
)
def ended(case: ModelCase) -> None:
    """End tokens are taken from the texts that are made without any."""
    model, largest = case.model, case.spec.model.vocab_size - 1
    prompts = [case.integers(f"prompt {n}", 0, largest, 1, 4) for n in range(case.integer("rows", 1, 3))]
    options: dict[str, Any] = {"sampling": sampling_of(case)} if case.boolean("drawn") else {}
    if model.predictor is not None and not options and case.boolean("speculate"):
        options["speculate"] = True
    limit: dict[str, Any] = (
        {"max_length": case.integer("max_length", 5, 10)} if case.boolean("limited") else {}
    )
    free = generate(model, prompts, max_new_tokens=NEW, **options)
    picked = free[case.integer("row that ends", 0, len(prompts) - 1)].ids
    ends = {picked[case.integer("place", 0, NEW - 1)]}
    made = generate(model, prompts, max_new_tokens=NEW, stop_ids=sorted(ends), **options, **limit)
    for n, (prompt, whole, one) in enumerate(zip(prompts, free, made, strict=True)):
        room = min(NEW, limit.get("max_length", NEW + len(prompt)) - len(prompt))
        first = next((place for place, token in enumerate(whole.ids) if token in ends), NEW)
        wanted = whole.ids[: min(first + 1, room)]
        told = f"row {n}, of end tokens {sorted(ends)} and room for {room}"
        case.equal(one.ids, wanted, told)
        reason = ("stop", whole.ids[first]) if first < room else ("length", None)
        case.equal((one.finish_reason, one.stopped_by), reason, f"why {told}, ends")
        case.equal(one.prompt_length, len(prompt), f"the length of the prompt of row {n}")
        case.require(1 <= one.steps <= len(one.ids), f"{one.steps} steps gave {len(one.ids)} tokens")
        case.require(one.accepted <= one.drafted, f"{one.accepted} of {one.drafted} drafts were taken")
        # A draft that ends the text is taken, and is the one token of its step.
        beyond = one.accepted - (len(one.ids) - one.steps)
        case.require(
            beyond in (0, 1), f"row {n}: {one.accepted} drafts, {len(one.ids)} tokens in {one.steps} steps"
        )
