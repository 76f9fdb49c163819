"""Bugs that no part has alone: of steps, losses, caches and documents of whole models."""

from collections.abc import Iterator

import torch
from museum_kit import model_mutant, replaced


@model_mutant(
    "losses-are-means",
    "a micro-batch's loss is the mean over its own labels, and micro-batches are averaged",
    source="transformers #34191; torchtitan PR 2206",
)
def losses_are_means() -> Iterator[None]:
    def mean(summed):
        def averaged(logits, labels):
            return summed(logits, labels) / (labels >= 0).sum().clamp(min=1)

        return averaged

    with replaced("composeformer_training.next_token:_summed", mean):
        yield


@model_mutant(
    "loss-is-divided-by-each-micro-batch",
    "each micro-batch's loss is divided by its own labels, and all by the number of micro-batches",
    source="pitfalls 2, label-weighted losses (torchtitan PR 2206)",
)
def loss_is_divided_by_each_micro_batch() -> Iterator[None]:
    told = {}

    def met(wrapped):
        def counting(model, batches):
            found = wrapped(model, batches)
            told["number"] = len(found)
            return found

        return counting

    def summed(wrapped):
        def remembering(model, weight, tokens):
            told["weight"] = weight
            return wrapped(model, weight, tokens)

        return remembering

    def add(wrapped):
        def scaled(self, outputs, batch, objective, share):
            own = objective.weight(batch.seen()).clamp(min=1)
            return wrapped(self, outputs, batch, objective, share) * told["weight"] / own / told["number"]

        return scaled

    with (
        replaced("composeformer.train.step:met", met),
        replaced("composeformer.train.step:summed", summed),
        replaced("composeformer.train.ledger:Ledger.add", add),
    ):
        yield


@model_mutant(
    "mixture-counts-padding",
    "padding chooses experts, and is counted",
    source="pitfalls 2, row 10 (Megatron-LM #1984)",
)
def mixture_counts_padding() -> Iterator[None]:
    def blind(forward):
        return lambda self, x, batch: forward(self, x, batch._replace(valid=None))

    with replaced("composeformer_moe.reference:MixtureOfExperts.forward", blind):
        yield


@model_mutant(
    "padding-moves-positions",
    "positions count padding",
    source="pitfalls 2, row 25 (transformers #48256)",
)
def padding_moves_positions() -> Iterator[None]:
    def counting(count):
        return lambda ids, documents, valid: count(ids, documents, None)

    with replaced("composeformer.decoder:count_positions", counting):
        yield


@model_mutant(
    "predictor-crosses-documents",
    "a predictor goes on into the next packed document",
    source="pitfalls 2, row 23 (Megatron-LM PR 6205)",
)
def predictor_crosses_documents() -> Iterator[None]:
    def blind(reach):
        return lambda batch, valid, length: reach(batch._replace(documents=None), valid, length)

    with replaced("composeformer_mtp.module:reach", blind):
        yield


@model_mutant(
    "predictions-are-labelled-one-early",
    "a prediction's label is the token that it was given",
    source="pitfalls 2, row 23; sglang #6423",
)
def predictions_are_labelled_one_early() -> Iterator[None]:
    def early(forward):
        def wrong(self, stream, hidden, batch):
            found = forward(self, stream, hidden, batch)
            return [p._replace(batch=p.batch._replace(ids=p.batch.ids.roll(1, 1))) for p in found]

        return wrong

    with replaced("composeformer_mtp.module:MultiTokenPrediction.forward", early):
        yield


@model_mutant(
    "positions-run-on-across-documents",
    "packed documents are masked, and their positions go on",
    source="pitfalls 2, row 24 (transformers PR 46634)",
    by="model.cached",
)
def positions_run_on_across_documents() -> Iterator[None]:
    def running(count):
        def wrong(documents, valid, last=None):
            found = count(documents, valid, last)
            return found._replace(tokens=torch.arange(1, documents.shape[1] + 1).expand_as(documents))

        return wrong

    with replaced("composeformer.decoder:count_documents", running):
        yield


@model_mutant(
    "absorbed-scales-by-latents",
    "absorbed attention scales by the width of the latents, not by that of keys",
    source="pitfalls 2, rows 17 and 25: absorbed differs from plain",
    implementation="absorbed",
)
def absorbed_scales_by_latents() -> Iterator[None]:
    def scaled(attend):
        def wrong(self, q, r, latent, key, seen):
            before = self.scale
            self.scale = latent.shape[-1] ** -0.5
            try:
                return attend(self, q, r, latent, key, seen)
            finally:
                self.scale = before

        return wrong

    with replaced("composeformer_attention_mla.absorbed:Absorbed.attend", scaled):
        yield


@model_mutant(
    "load-is-kept-by-the-forward",
    "a mixture adds its load to a tensor of its own, which recomputation does once more",
    source="pitfalls 2, row 8 (torchtitan PR 1593)",
)
def load_is_kept_by_the_forward() -> Iterator[None]:
    def keeping(forward):
        def wrong(self, x, batch):
            found = forward(self, x, batch)
            counts = dict(found.aux.counts)
            for path, load in counts.items():
                graph = torch.is_grad_enabled() and x.requires_grad
                kept = self.__dict__.get("kept") if graph else None
                # A new step begins where the last was read.
                counts[path] = load if kept is None or kept.shape != load.shape else kept.add_(load)
                self.__dict__["kept"] = counts[path]
            return found._replace(aux=found.aux._replace(counts=counts))

        return wrong

    with replaced("composeformer_moe.reference:MixtureOfExperts.forward", keeping):
        yield


@model_mutant(
    "evaluation-moves-the-bias",
    "a router moves its bias in every forward, gradients or not",
    source="pitfalls 2, row 6 (torchtitan PR 4148)",
)
def evaluation_moves_the_bias() -> Iterator[None]:
    def moving(forward):
        def wrong(self, x, batch):
            found = forward(self, x, batch)
            if not torch.is_grad_enabled():
                self.bias += 0.5 * torch.linspace(-1, 1, len(self.bias))
            return found

        return wrong

    with replaced("composeformer_moe.sigmoid_bias:SigmoidBiasRouter.forward", moving):
        yield


@model_mutant(
    "nothing-to-learn-is-divided-by",
    "a mean over labels, of which there are none",
    source="pitfalls 2: all labels ignored (NeMo AutoModel #3796, OLMo-core PR 657)",
)
def nothing_to_learn_is_divided_by() -> Iterator[None]:
    def divided(summed):
        def wrong(logits, labels):
            number = (labels >= 0).sum()
            return summed(logits, labels) / number * number

        return wrong

    with replaced("composeformer_training.next_token:_summed", divided):
        yield


@model_mutant(
    "predictions-are-not-learnt",
    "the predictions' losses are told, and not in the step's",
    source="pitfalls 1, row 13 (ms-swift #6644)",
)
def predictions_are_not_learnt() -> Iterator[None]:
    with replaced("composeformer.train.step:_predictor_weight", lambda _: lambda model, values: 0.0):
        yield


@model_mutant(
    "norm-leaves-the-experts-out",
    "the norm of the gradients is that of what is not in groups",
    source="pitfalls 2, row 16 (Megatron-LM PR 6489)",
    by="model.step",
)
def norm_leaves_the_experts_out() -> Iterator[None]:
    def partial(counted):
        return lambda self: (p for p in counted(self) if p.ndim < 3)

    with replaced("composeformer.train.gradients:Gradients._counted", partial):
        yield


@model_mutant(
    "tied-head-is-detached",
    "a tied head's use of the matrix gives no gradient",
    source="pitfalls 2: tied weights (Megatron-Bridge #919)",
)
def tied_head_is_detached() -> Iterator[None]:
    def detached(forward):
        def wrong(self, hidden):
            logits = forward(self, hidden)
            weight = self.projection.weight
            # Adds zero, and takes the weight's gradient away again.
            own = hidden.detach().to(weight.dtype) @ (weight - weight.detach()).mT * self.scale
            slope = 1 - (logits.detach() / self.cap) ** 2 if self.cap is not None else 1
            return logits - (own * slope).to(logits.dtype)

        return wrong

    def when_tied(forward):
        wrong = detached(forward)

        def either(self, hidden):
            return (wrong if getattr(self, "tied", False) else forward)(self, hidden)

        return either

    def marked(init):
        def wrong(self, config, site):
            init(self, config, site)
            self.tied = site.spec.model.tie_embeddings

        return wrong

    with (
        replaced("composeformer_dense.ends:LinearHead.__init__", marked),
        replaced("composeformer_dense.ends:LinearHead.forward", when_tied),
    ):
        yield


@model_mutant(
    "rollback-leaves-the-lengths",
    "the mixers forget tokens, and the model goes on counting positions from them",
    source="pitfalls 2, row 25 (llama.cpp #25618)",
)
def rollback_leaves_the_lengths() -> Iterator[None]:
    def leaving(rollback):
        def wrong(self, counts):
            before = self.lengths
            rollback(self, counts)
            self.lengths = before

        return wrong

    with replaced("composeformer.model_cache:ModelCache.rollback", leaving):
        yield


@model_mutant(
    "prefill-gives-the-first-logits",
    "of a prompt's logits those of its first token are kept, where one was asked for",
    source="off by one of `num_logits_to_keep` (transformers PR 31292)",
)
def prefill_gives_the_first_logits() -> Iterator[None]:
    def first(forward):
        def wrong(self, ids, *, last_only=False, **told):
            found = forward(self, ids, **told)
            return found._replace(logits=found.logits[:, :1]) if last_only else found

        return wrong

    with replaced("composeformer.decoder:Model.forward", first):
        yield


@model_mutant(
    "given-positions-are-counted-anew",
    "positions that a caller gives are not used",
    source="position ids that a forward accepts and leaves, in many ports",
)
def given_positions_are_counted_anew() -> Iterator[None]:
    def counting(batch):
        def wrong(self, ids, positions=None, *more, **told):
            return batch(self, ids, None, *more, **told)

        return wrong

    with replaced("composeformer.decoder:Model.batch", counting):
        yield


@model_mutant(
    "every-draft-is-accepted",
    "a draft is taken whatever the model itself would say",
    source="pitfalls 2, row 25 (mlx-lm #1423)",
)
def every_draft_is_accepted() -> Iterator[None]:
    def taking(verify):
        def wrong(self, logits, fed):
            best = logits.argmax(-1).tolist()
            return [
                [*self._drafts[row][: number - 1], best[row][number - 1]] if number else []
                for row, number in enumerate(fed)
            ]

        return wrong

    with replaced("composeformer.generation.speculation:Speculation._verify", taking):
        yield


@model_mutant(
    "gradients-are-averaged-over-processes",
    "gradients that add over processes are divided by their number",
    source="pitfalls 2, row 15 (DeepSpeed PR 5259, Megatron-LM PR 5956)",
)
def gradients_are_averaged_over_processes() -> Iterator[None]:
    def averaging(reduce):
        def wrong(self):
            reduce(self)
            for parameter in (*self.experts, *self.whole):
                if parameter.grad is not None:
                    parameter.grad /= self.world.size

        return wrong

    with replaced("composeformer.train.gradients:Gradients.reduce", averaging):
        yield
