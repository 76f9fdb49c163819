"""Bugs of serving, thought of without a look at the laws: drafts that are taken or forgotten wrongly, tokens that are
drawn by another distribution, predictors that do not rest.
"""

from collections.abc import Iterator

import attrs
import torch
from museum_kit import model_mutant, mutant, replaced

from composeformer.generation.sampling import Candidates, pick

UNSEEN = "thought of without the laws"
SPECULATION = "composeformer.generation.speculation"


@mutant(
    "predictor-runs-in-evaluation",
    "predictor",
    "mtp",
    "a model predicts, and counts what its predictor tells, in evaluation too",
    source=UNSEEN,
)
def predictor_runs_in_evaluation() -> Iterator[None]:
    def wrong(predicts):
        def always(self, predict, cache, batch):
            if predict is None and cache is None and batch.phase == "train":
                return self.predictor is not None
            return predicts(self, predict, cache, batch)

        return always

    with replaced("composeformer.decoder:Model._predicts", wrong):
        yield


@mutant(
    "predictor-runs-in-serving",
    "predictor",
    "mtp",
    "a model in training mode predicts in every phase",
    source=UNSEEN,
    by="predictor.rests",
)
def predictor_runs_in_serving() -> Iterator[None]:
    def wrong(predicts):
        def always(self, predict, cache, batch):
            if predict is None:
                return self.predictor is not None and self.training and cache is None
            return predicts(self, predict, cache, batch)

        return always

    with replaced("composeformer.decoder:Model._predicts", wrong):
        yield


@mutant(
    "speculation-forgets-one-too-few",
    "predictor",
    "mtp",
    "after a wrong draft a row keeps one token too many in its cache",
    source=UNSEEN,
)
def speculation_forgets_one_too_few() -> Iterator[None]:
    def wrong(take):
        def keeping(self, logits):
            rollback = self.cache.rollback
            self.cache.rollback = lambda counts: rollback((counts - 1).clamp(min=0))
            try:
                return take(self, logits)
            finally:
                del self.cache.rollback

        return keeping

    with replaced(f"{SPECULATION}:Speculation.take", wrong):
        yield


@mutant(
    "every-drawn-draft-is-taken", "predictor", "mtp", "a draft that was drawn is never refused", source=UNSEEN
)
def every_drawn_draft_is_taken() -> Iterator[None]:
    def wrong(accept):
        def taken(kept, draft, drafted_from, draws, step):
            return accept(kept, draft, drafted_from, draws, step) if draft is None else draft

        return taken

    with replaced(f"{SPECULATION}:accept", wrong):
        yield


@mutant(
    "refused-drafts-are-drawn-anew",
    "predictor",
    "mtp",
    "in place of a draft that is refused any token is drawn, not one that the drafts lack",
    source=UNSEEN,
    by="predictor.sampled",
)
def refused_drafts_are_drawn_anew() -> Iterator[None]:
    def wrong(accept):
        def anew(kept, draft, drafted_from, draws, step):
            found = accept(kept, draft, drafted_from, draws, step)
            return found if found == draft else pick(kept, draws.uniform(step))

        return anew

    with replaced(f"{SPECULATION}:accept", wrong):
        yield


@mutant(
    "drafts-are-taken-by-the-models-chance",
    "predictor",
    "mtp",
    "a draft is taken with the model's probability, not with its quotient",
    source=UNSEEN,
    by="predictor.sampled",
)
def drafts_are_taken_by_the_models_chance() -> Iterator[None]:
    def wrong(probability):
        def one(of, token):
            found = probability(of, token)
            return 1.0 if one.calls % 2 else found

        def counted(of, token):
            one.calls += 1
            return one(of, token)

        one.calls = -1
        return lambda of, token: counted(of, token)

    with replaced(f"{SPECULATION}:_probability", wrong):
        yield


def _drafted(wrong):
    """Drafts are picked otherwise, and weighed as before."""

    def only(draft):
        def picked(self, *given):
            with replaced(f"{SPECULATION}:pick", wrong):
                draft(self, *given)

        return picked

    return replaced(f"{SPECULATION}:Speculation._draft", only)


@mutant(
    "likeliest-drafts-are-drawn-ones",
    "predictor",
    "mtp",
    "the likeliest token is drafted, and taken as if it had been drawn",
    source=UNSEEN,
    by="predictor.sampled",
)
def likeliest_drafts_are_drawn_ones() -> Iterator[None]:
    with _drafted(lambda _: lambda kept, uniform: int(kept.ids[kept.probabilities.argmax()])):
        yield


@mutant(
    "one-number-draws-twice",
    "predictor",
    "mtp",
    "the number that refuses a draft also draws what stands in its place",
    source=UNSEEN,
    by="predictor.sampled",
)
def one_number_draws_twice() -> Iterator[None]:
    def wrong(uniform):
        return lambda self, step, purpose=b"": uniform(self, step)

    with replaced("composeformer.generation.sampling:Draws.uniform", wrong):
        yield


@model_mutant("temperature-multiplies", "logits are multiplied by the temperature", source=UNSEEN)
def temperature_multiplies() -> Iterator[None]:
    def wrong(candidates):
        def hotter(logits, sampling):
            return candidates(logits, attrs.evolve(sampling, temperature=1 / sampling.temperature))

        return hotter

    with replaced("composeformer.generation.sampling:candidates", wrong):
        yield


@model_mutant(
    "top-p-leaves-out-the-last",
    "top-p keeps the tokens that stay below it together, not those that reach it",
    source=UNSEEN,
    by="model.sampled",
)
def top_p_leaves_out_the_last() -> Iterator[None]:
    def wrong(candidates):
        def fewer(logits, sampling):
            found = candidates(logits, sampling)
            if sampling.top_p is None or len(found.ids) < 2:
                return found
            kept = torch.arange(len(found.ids)) != found.probabilities.argmin()
            return Candidates(found.ids[kept], found.probabilities[kept] / found.probabilities[kept].sum())

        return fewer

    with replaced("composeformer.generation.sampling:candidates", wrong):
        yield


@model_mutant("rows-draw-alike", "equal prompts draw the same numbers", source=UNSEEN, by="model.sampled")
def rows_draw_alike() -> Iterator[None]:
    with replaced(
        "composeformer.generation.sampling:Draws.__init__",
        lambda init: lambda self, seed, prompt, copy=0: init(self, seed, prompt),
    ):
        yield


@model_mutant(
    "rows-draw-by-their-place",
    "what a row draws depends on how many rows stand behind it",
    source=UNSEEN,
    by="model.sampled",
)
def rows_draw_by_their_place() -> Iterator[None]:
    def wrong(choose):
        def shared(logits, sampling, draws, steps, rows):
            return choose(logits, sampling, draws[::-1], steps, rows)

        return shared

    with replaced("composeformer.generation.decoding:choose", wrong):
        yield


@model_mutant("seeds-draw-alike", "every seed draws the same texts", source=UNSEEN, by="model.sampled")
def seeds_draw_alike() -> Iterator[None]:
    with replaced(
        "composeformer.generation.sampling:Draws.__init__",
        lambda init: lambda self, seed, prompt, copy=0: init(self, 0, prompt, copy),
    ):
        yield


@model_mutant(
    "steps-draw-alike", "every token of a text is drawn by the same number", source=UNSEEN, by="model.sampled"
)
def steps_draw_alike() -> Iterator[None]:
    with replaced(
        "composeformer.generation.sampling:Draws.uniform",
        lambda uniform: lambda self, step, purpose=b"": uniform(self, 0, purpose),
    ):
        yield
