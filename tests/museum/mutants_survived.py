"""Bugs of steps and schedules, thought of without a look at the laws, which those did not tell at first."""

from collections.abc import Iterator

import attrs
import torch
from museum_kit import model_mutant, mutant, replaced

from composeformer.errors import InputError

UNSEEN = "thought of without the laws"
STEP = "composeformer.train.step"
LEDGER = "composeformer.train.ledger:Ledger"


@model_mutant("metrics-are-sums", "a metric is told as a sum, the more the more it is of", source=UNSEEN)
def metrics_are_sums() -> Iterator[None]:
    def wrong(pair):
        return lambda value, weight: torch.stack([pair(value, weight)[0], (weight > 0).double()])

    with replaced("composeformer.train.ledger:_pair", wrong):
        yield


@model_mutant(
    "metrics-are-means-of-means",
    "a metric is the mean of those of micro-batches, whatever each is of",
    source=UNSEEN,
    by="model.accumulated",
)
def metrics_are_means_of_means() -> Iterator[None]:
    def wrong(pair):
        def mean(value, weight):
            total, number = pair(value, weight)
            return torch.stack([total / number.clamp(min=1), torch.ones_like(number)])

        return mean

    with replaced("composeformer.train.ledger:_pair", wrong):
        yield


@model_mutant(
    "side-losses-are-of-the-last-micro-batch",
    "what a step tells of a side loss is that of its last micro-batch",
    source=UNSEEN,
    by="model.accumulated",
)
def side_losses_are_of_the_last_micro_batch() -> Iterator[None]:
    def wrong(result):
        def last(self, *given):
            self._losses = {path: sides[-1:] for path, sides in self._losses.items()}
            return result(self, *given)

        return last

    with replaced(f"{LEDGER}.result", wrong):
        yield


@model_mutant(
    "tokens-count-padding",
    "the tokens of a step are all that rows have room for",
    source=UNSEEN,
    by="model.told",
)
def tokens_count_padding() -> Iterator[None]:
    with replaced(
        "composeformer.train.batch:TokenBatch.num_tokens",
        lambda _: lambda self: torch.tensor(self.ids.numel()),
    ):
        yield


@model_mutant("clipping-lengthens", "gradients are scaled to the limit, from below, too", source=UNSEEN)
def clipping_lengthens() -> Iterator[None]:
    def wrong(_):
        def scaled(self, norm, largest):
            for parameter in self._all():
                if parameter.grad is not None:
                    parameter.grad.mul_(largest / (norm + 1e-6))

        return scaled

    with replaced("composeformer.train.gradients:Gradients.clip", wrong):
        yield


@model_mutant(
    "schedule-is-not-read",
    "a scheduled speed of the bias is left for that of the spec",
    source=UNSEEN,
    by="model.scheduled",
)
def schedule_is_not_read() -> Iterator[None]:
    with replaced(
        "composeformer.train.after:Run.value", lambda _: lambda self, field: getattr(self.config, field)
    ):
        yield


@model_mutant(
    "schedule-comes-a-step-late", "each step has the scheduled values of the one before", source=UNSEEN
)
def schedule_comes_a_step_late() -> Iterator[None]:
    def wrong(weight):
        def late(model, values):
            before = model.__dict__.get("before", {})
            model.__dict__["before"] = values
            return weight(model, before)

        return late

    with replaced(f"{STEP}:_predictor_weight", wrong):
        yield


@mutant(
    "learning-rate-a-step-late",
    "optimizer",
    "adamw",
    "a step has the learning rate of the one before",
    source=UNSEEN,
    by="optimizer.learning-rate",
)
def learning_rate_a_step_late() -> Iterator[None]:
    def wrong(make):
        def made(config, trained, rate):
            found = make(config, trained, rate)
            step, rates = found.step, [group["lr"] for group in found.param_groups]

            def late(*given, **more):
                now = [group["lr"] for group in found.param_groups]
                for group, before in zip(found.param_groups, rates, strict=True):
                    group["lr"] = before
                told = step(*given, **more)
                for group, own in zip(found.param_groups, now, strict=True):
                    group["lr"] = own
                rates[:] = now
                return told

            found.step = late
            return found

        return made

    with replaced("composeformer_training.adamw:make", wrong):
        yield


def _left(check):
    def wrong(rolled_back):
        def unchecked(counts, lengths, longest, max_rollback):
            counts, longest = counts.to(lengths), torch.maximum(longest, lengths)
            left = lengths - counts
            if check(counts, left, longest, max_rollback):
                raise InputError("too many")
            return left.clamp(min=0), longest

        return unchecked

    return wrong


@model_mutant(
    "rows-are-forgotten-below-zero",
    "a row that forgets more tokens than it has is left with none, and nobody is told",
    source=UNSEEN,
)
def rows_are_forgotten_below_zero() -> Iterator[None]:
    wrong = _left(lambda counts, left, longest, most: bool(((counts < 0) | (longest - left > most)).any()))
    with (
        replaced("composeformer.cache:rolled_back", wrong),
        replaced("composeformer.model_cache:rolled_back", wrong),
    ):
        yield


@model_mutant(
    "rows-remember-more-than-they-had",
    "a negative number of tokens to forget makes a row longer",
    source=UNSEEN,
    by="model.overdrawn",
)
def rows_remember_more_than_they_had() -> Iterator[None]:
    wrong = _left(lambda counts, left, longest, most: bool(((left < 0) | (longest - left > most)).any()))
    with (
        replaced("composeformer.cache:rolled_back", wrong),
        replaced("composeformer.model_cache:rolled_back", wrong),
    ):
        yield


@model_mutant(
    "training-counts-positions-anew",
    "a training step leaves the positions that its batch gives",
    source=UNSEEN,
)
def training_counts_positions_anew() -> Iterator[None]:
    with replaced(
        f"{STEP}:_forward",
        lambda forward: lambda model, batch: forward(model, batch._replace(positions=None)),
    ):
        yield


@model_mutant(
    "rows-are-lengthened-by-tokens",
    "what lengthens the rows of one process for another's is real",
    source=UNSEEN,
)
def rows_are_lengthened_by_tokens() -> Iterator[None]:
    def wrong(padded):
        def real(self, length):
            found = padded(self, length)
            return found if found is self or self.valid is not None else found._replace(valid=None)

        return real

    with replaced("composeformer.train.batch:TokenBatch.padded", wrong):
        yield


@model_mutant(
    "what-is-not-finite-is-stepped", "a step is taken whatever its loss and gradients are", source=UNSEEN
)
def what_is_not_finite_is_stepped() -> Iterator[None]:
    with replaced("composeformer.train.ledger:isfinite", lambda _: lambda number: True):
        yield


@model_mutant(
    "only-losses-must-be-finite",
    "a step is taken where the loss is finite, whatever its gradients are",
    source=UNSEEN,
    by="model.not-finite",
)
def only_losses_must_be_finite() -> Iterator[None]:
    def wrong(result):
        return lambda self, step, norm, tokens, weight: result(self, step, norm.nan_to_num(), tokens, weight)

    with replaced(f"{LEDGER}.result", wrong):
        yield


@model_mutant(
    "parts-are-not-told-the-step", "after each step parts are told that it was the first", source=UNSEEN
)
def parts_are_not_told_the_step() -> Iterator[None]:
    def wrong(after_step):
        return lambda model, totals, run: after_step(model, totals, attrs.evolve(run, step=0))

    with replaced(f"{STEP}:after_step", wrong):
        yield


@model_mutant(
    "work-after-each-micro-batch",
    "parts work once for each micro-batch",
    source=UNSEEN,
    by="model.after-step",
)
def work_after_each_micro_batch() -> Iterator[None]:
    def wrong(add):
        def working(self, outputs, batch, *given):
            self.__dict__["number"] = self.__dict__.get("number", 0) + 1
            return add(self, outputs, batch, *given)

        return working

    def often(result):
        def told(self, *given):
            numbers.append(self.__dict__.get("number", 1))
            return result(self, *given)

        return told

    def again(after_step):
        def work(model, totals, run):
            for _ in range(numbers.pop() - 1):
                after_step(model, totals, run)
            return after_step(model, totals, run)

        return work

    numbers: list[int] = []
    with (
        replaced(f"{LEDGER}.add", wrong),
        replaced(f"{LEDGER}.result", often),
        replaced(f"{STEP}:after_step", again),
    ):
        yield


@model_mutant("end-tokens-are-passed-over", "a row that ends at an odd place goes on", source=UNSEEN)
def end_tokens_are_passed_over() -> Iterator[None]:
    def wrong(take):
        def going_on(self, token):
            piece = take(self, token)
            if self.finish_reason == "stop" and len(self.ids) < self.room and len(self.ids) % 2:
                self.finish_reason = self.stopped_by = None
            return piece

        return going_on

    with replaced("composeformer.generation.rows:Row.take", wrong):
        yield


@model_mutant(
    "zero-is-no-schedule",
    "a scheduled speed of zero is taken for none",
    source=UNSEEN,
    by="model.scheduled",
)
def zero_is_no_schedule() -> Iterator[None]:
    def wrong(value):
        def truthy(self, field):
            return value(self, field) or getattr(self.config, field)

        return truthy

    with replaced("composeformer.train.after:Run.value", wrong):
        yield


@mutant(
    "everything-decays",
    "optimizer",
    "adamw",
    "gains and biases decay, too",
    source=UNSEEN,
    by="optimizer.adam",
)
def everything_decays() -> Iterator[None]:
    with replaced("composeformer.train.roles:Trained.is_matrix", lambda _: property(lambda self: True)):
        yield


@model_mutant(
    "a-cache-takes-any-tokens", "nothing asks what a cache has room for, or was made for", source=UNSEEN
)
def a_cache_takes_any_tokens() -> Iterator[None]:
    with replaced("composeformer.model_cache:ModelCache.check", lambda _: lambda self, *given: None):
        yield


@model_mutant(
    "any-ids-are-embedded", "nothing asks whether there are such ids", source=UNSEEN, by="model.beyond"
)
def any_ids_are_embedded() -> Iterator[None]:
    with replaced("composeformer.decoder:check_forward", lambda _: lambda *given: None):
        yield
