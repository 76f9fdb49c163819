"""Bugs of multi-token prediction: what is joined, which token is predicted, and what drafts leave behind."""

from collections.abc import Iterator
from copy import deepcopy

import attrs
import torch
from museum_kit import mutant, replaced
from torch.func import functional_call

from composeformer.decoder import Layer
from composeformer.tensors import Batch, Prediction, Rotary
from composeformer_mtp.module import reach

MODULE = "composeformer_mtp.module"
DEPTH = f"{MODULE}:Depth.forward"
FORWARD = f"{MODULE}:MultiTokenPrediction.forward"
DRAFTING = "composeformer_mtp.drafting"


@mutant(
    "predictor-normalises-in-place",
    "predictor",
    "mtp",
    "the model's hidden states are written over before its head has read them",
    source="in-place operations on shared activations",
)
def predictor_normalises_in_place() -> Iterator[None]:
    def wrong(forward):
        def written(self, stream, hidden, batch):
            hidden.detach().mul_(0.5)
            return forward(self, stream, hidden, batch)

        return written

    with replaced(FORWARD, wrong):
        yield


@mutant(
    "predictor-labels-across-documents",
    "predictor",
    "mtp",
    "the tokens ahead are another document's at a document's end, labels too",
    source="pitfalls 2.23: rolling must stop at packed documents' edges; MLM PR4495, PR6205",
)
def predictor_labels_across_documents() -> Iterator[None]:
    def wrong(reach):
        return lambda batch, valid, length: reach(batch._replace(documents=None), valid, length)

    with replaced(f"{MODULE}:reach", wrong):
        yield


@mutant(
    "predictor-labels-across-padding",
    "predictor",
    "mtp",
    "a token is predicted from where padding stands between",
    source="pitfalls 2.23: unpadded boundaries; HF#46129",
)
def predictor_labels_across_padding() -> Iterator[None]:
    def wrong(reach):
        def over(batch, valid, length):
            first = None if batch.valid is None else batch.valid[:, :length]
            return reach(batch._replace(valid=None), first, length)

        return over

    with replaced(f"{MODULE}:reach", wrong):
        yield


def rolled(self, stream, hidden, batch, *, embedded_from=0, fill=None):
    """The predictor's forward, depth by depth, with tokens embedded from another place or filled at the end."""
    found, valid = [], batch.valid
    for k, depth in enumerate(self.depths, 1):
        length = batch.ids.shape[1] - k if fill is None else batch.ids.shape[1]
        if length < 1 or (fill is None and batch.ids.shape[1] - k < 1):
            break
        if fill is None:
            ids = batch.ids[:, k:]
            valid = reach(batch, valid, length)
        else:
            ids = torch.nn.functional.pad(batch.ids[:, k:], (0, min(k, length)), value=fill)
        ahead = Batch(
            ids,
            batch.positions[:, :length],
            None if batch.documents is None else batch.documents[:, :length],
            valid,
            {key: Rotary(*(table[:, :length] for table in pair)) for key, pair in batch.tables.items()},
            batch.phase,
        )
        start = k + embedded_from
        embedded = torch.nn.functional.pad(batch.ids, (0, max(0, start + length - batch.ids.shape[1])))
        read = ids if fill is not None else embedded[:, start : start + length]
        hidden, aux = depth(hidden[:, :length], self.embedding(read), ahead)
        found.append(Prediction(self.head(hidden), hidden, ahead, 1 / len(self.depths), aux))
    return found


@mutant(
    "predictor-fills-with-token-zero",
    "predictor",
    "mtp",
    "rolled tokens end in zeros, which are taken as tokens and as labels",
    source="pitfalls 2.23: PaddleFleet PR1808 fills 0, not ignore",
)
def predictor_fills_with_token_zero() -> Iterator[None]:
    with replaced(FORWARD, lambda _: lambda self, s, h, batch: rolled(self, s, h, batch, fill=0)):
        yield


@mutant(
    "predictor-embeds-its-label",
    "predictor",
    "mtp",
    "rolled once too often: the token to be predicted is read",
    source="pitfalls 2.23: off by one of rolled ids; a loss near 0, and no draft taken",
)
def predictor_embeds_its_label() -> Iterator[None]:
    with replaced(FORWARD, lambda _: lambda self, s, h, batch: rolled(self, s, h, batch, embedded_from=1)):
        yield


@mutant(
    "predictor-embeds-the-last-token",
    "predictor",
    "mtp",
    "rolled once too seldom: a depth knows no more than the one before it",
    source="pitfalls 2.23: sglang#6423, garbage drafts",
)
def predictor_embeds_the_last_token() -> Iterator[None]:
    with replaced(FORWARD, lambda _: lambda self, s, h, batch: rolled(self, s, h, batch, embedded_from=-1)):
        yield


@mutant(
    "predictor-counts-its-padding",
    "predictor",
    "mtp",
    "the layer is told of no padding: it is seen, and counted by its experts",
    source="pitfalls 2.10 in a predictor's layer",
)
def predictor_counts_its_padding() -> Iterator[None]:
    def wrong(forward):
        def unmasked(self, hidden, embedded, batch, cache=None):
            return forward(self, hidden, embedded, batch._replace(valid=None), cache)

        return unmasked

    with replaced(DEPTH, wrong):
        yield


@mutant(
    "predictor-forgets-the-documents",
    "predictor",
    "mtp",
    "the layer sees across packed documents",
    source="pitfalls 2.24: packed documents leak through MTP",
)
def predictor_forgets_the_documents() -> Iterator[None]:
    def wrong(forward):
        def together(self, hidden, embedded, batch, cache=None):
            return forward(self, hidden, embedded, batch._replace(documents=None), cache)

        return together

    with replaced(DEPTH, wrong):
        yield


def joining(join):
    """A depth's forward with another join(self, hidden, embedded)."""

    def forward(self, hidden, embedded, batch, cache=None):
        joined = join(self, hidden, embedded.to(hidden.dtype))
        stream, aux = Layer.forward(
            self, self.residual.open(self.eh_proj(joined).to(hidden.dtype)), batch, cache
        )
        return self.residual.close(stream), aux

    return replaced(DEPTH, lambda _: forward)


@mutant(
    "predictor-joins-hidden-first",
    "predictor",
    "mtp",
    "[hidden; embedding], as the paper's equation has it: released weights have the embedding first",
    source="pitfalls 2.23 and 4.9: MLM#1588",
)
def predictor_joins_hidden_first() -> Iterator[None]:
    with joining(lambda self, h, e: torch.cat([self.hnorm(h), self.enorm(e)], -1)):
        yield


@mutant(
    "predictor-reads-the-stream",
    "predictor",
    "mtp",
    "depth 1 starts from the stream before the model's last norm",
    source="pitfalls 4.9: h is post-final-norm, ATOM#1764",
)
def predictor_reads_the_stream() -> Iterator[None]:
    def wrong(forward):
        return lambda self, stream, hidden, batch: forward(self, stream, stream, batch)

    with replaced(FORWARD, wrong):
        yield


@mutant(
    "predictor-goes-on-before-the-norm",
    "predictor",
    "mtp",
    "a further depth takes up the hidden state before the norm of the one before it",
    source="pitfalls 4.9: later depths chain post-norm",
)
def predictor_goes_on_before_the_norm() -> Iterator[None]:
    def wrong(forward):
        def chained(self, stream, hidden, batch):
            closings = [depth.residual.close for depth in self.depths]
            kept = []

            def keeping(close):
                def run(x):
                    kept.append(x)
                    return close(x)

                return run

            def going_on(run):
                return lambda h, e, b, cache=None: run(kept[-1][:, : h.shape[1]] if kept else h, e, b, cache)

            runs = [depth.forward for depth in self.depths]
            for depth, close, run in zip(self.depths, closings, runs, strict=True):
                depth.residual.close = keeping(close)
                depth.forward = going_on(run)
            try:
                return forward(self, stream, hidden, batch)
            finally:
                for depth in self.depths:
                    del depth.residual.close, depth.forward

        return chained

    with replaced(FORWARD, wrong):
        yield


@mutant(
    "predictor-keeps-a-head-of-its-own",
    "predictor",
    "mtp",
    "the shared head is a copy of the initial one",
    source="pitfalls 2.23: `shared_head` left random or stale, vllm#43456, HF#46129",
)
def predictor_keeps_a_head_of_its_own() -> Iterator[None]:
    def wrong(forward):
        def apart(self, stream, hidden, batch):
            self.__dict__.setdefault("copy", deepcopy(self.head._module))
            self.head, shared = self.copy.forward, self.head
            try:
                return forward(self, stream, hidden, batch)
            finally:
                self.head = shared

        return apart

    with replaced(FORWARD, wrong):
        yield


@mutant(
    "predictor-teaches-no-head",
    "predictor",
    "mtp",
    "predictions reach the head detached: their loss does not train it",
    source="gradients of shared ends lost between pipeline stages (trials, walk 4)",
)
def predictor_teaches_no_head() -> Iterator[None]:
    def wrong(forward):
        def detached(self, stream, hidden, batch):
            shared = self.head
            held = {name: p.detach() for name, p in shared._module.named_parameters()}
            self.head = lambda h: functional_call(shared._module, held, (h,))
            try:
                return forward(self, stream, hidden, batch)
            finally:
                self.head = shared

        return detached

    with replaced(FORWARD, wrong):
        yield


@mutant(
    "predictor-sums-its-depths",
    "predictor",
    "mtp",
    "losses of depths are added where their mean is weighed",
    source="MTP loss of D depths weighs D times lambda, not lambda (arXiv 2412.19437, equation 25)",
)
def predictor_sums_its_depths() -> Iterator[None]:
    def wrong(forward):
        return lambda self, s, h, batch: [each._replace(share=1.0) for each in forward(self, s, h, batch)]

    with replaced(FORWARD, wrong):
        yield


@mutant(
    "predictor-hides-its-head",
    "predictor",
    "mtp",
    "the cost forgets that every depth runs the head again",
    source="FLOPs of MTP counted without its logits",
)
def predictor_hides_its_head() -> Iterator[None]:
    def wrong(cost):
        return lambda self, site, phase: [attrs.evolve(each, times=0) for each in cost(self, site, phase)]

    with replaced("composeformer_mtp.config:MTP.cost", wrong):
        yield


@mutant(
    "predictor-keeps-wrong-drafts",
    "predictor",
    "mtp",
    "cache entries that rest on rejected drafts stay",
    source="pitfalls 2.25: bad rollback, llama.cpp#25618, mlx-lm#1423 (trials, walk 4)",
)
def predictor_keeps_wrong_drafts() -> Iterator[None]:
    def wrong(draft):
        def kept(module, hidden, ids, valid, cache, rotary, choose):
            held = [each for each in cache.caches if each is not None]
            before = [each.rollback for each in held]
            for each in held:
                each.rollback = lambda n, each=each: type(each).rollback(each, torch.zeros_like(n))
            try:
                return draft(module, hidden, ids, valid, cache, rotary, choose)
            finally:
                for each, _ in zip(held, before, strict=True):
                    del each.rollback

        return kept

    with replaced(f"{MODULE}:draft", wrong):
        yield


@mutant(
    "predictor-goes-on-from-its-newest",
    "predictor",
    "mtp",
    "what is made again after a draft starts from the newest hidden state, not from k places back",
    source="trials, walk 4: the predictor needs the last hidden states",
)
def predictor_goes_on_from_its_newest() -> Iterator[None]:
    def wrong(kept):
        return lambda made, before, k, live: kept(made, before, 1, live)

    with replaced(f"{DRAFTING}:_kept", wrong):
        yield


@mutant(
    "predictor-drafts-are-taken-unseen",
    "predictor",
    "mtp",
    "every draft is taken, whatever the model says",
    source="pitfalls 2.25: greedy speculation is not plain decoding, ds4#750",
)
def predictor_drafts_are_taken_unseen() -> Iterator[None]:
    def wrong(verify):
        def unseen(self, logits, fed):
            taken = verify(self, logits, fed)
            return [
                [*self._drafts[row][: fed[row] - 1], tokens[-1]] if tokens else tokens
                for row, tokens in enumerate(taken)
            ]

        return unseen

    with replaced("composeformer.generation.speculation:Speculation._verify", wrong):
        yield


@mutant(
    "predictor-forgets-one-token-too-few",
    "predictor",
    "mtp",
    "after wrong drafts the model's cache keeps one of them",
    source="pitfalls 2.25: bad rollback in verification",
)
def predictor_forgets_one_token_too_few() -> Iterator[None]:
    def wrong(rollback):
        return lambda self, n: rollback(self, (n - 1).clamp(min=0))

    with replaced("composeformer.model_cache:ModelCache.rollback", wrong):
        yield
