"""Bugs of what balances experts: losses by other lengths or scores, biases that do not move, or by rounded loads."""

from collections.abc import Iterator

import torch
from museum_kit import mutant, replaced

SIGMOID = "composeformer_moe.sigmoid_bias:SigmoidBiasRouter"


@mutant(
    "balance-by-padded-length",
    "router",
    "softmax",
    "a sequence's shares are divided by its padded length",
    source="pitfalls 2, 10: masks that reach the counts and not the means",
)
def balance_by_padded_length() -> Iterator[None]:
    def wrong(balance_loss):
        def padded(scores, indices, valid):
            found = balance_loss(scores, indices, valid)
            real = 1.0 if valid is None else valid.sum() / max(1, valid.numel())
            return found * real

        return padded

    with replaced("composeformer_moe.softmax:balance_loss", wrong):
        yield


@mutant(
    "balance-of-sigmoids-that-are-no-shares",
    "router",
    "sigmoid-bias",
    "the balance loss takes sigmoids as they are, not divided by their sum",
    source="arXiv 2412.19437, equation 19 left out: several ports of V3's sequence-wise loss",
    by="router.balance",
)
def balance_of_sigmoids() -> Iterator[None]:
    def wrong(forward):
        def raw(self, x, batch):
            found = forward(self, x, batch)
            name = f"{self.path}.balance"
            if name not in found.aux.losses:
                return found
            from composeformer_moe.balance import balance_loss

            loss = self.balance_alpha * balance_loss(self.logits(x).sigmoid(), found.indices, batch.valid)
            return found._replace(aux=found.aux._replace(losses={name: loss}))

        return raw

    with replaced(f"{SIGMOID}.forward", wrong):
        yield


@mutant(
    "balance-loss-without-a-gradient",
    "router",
    "sigmoid-bias",
    "the shares in the balance loss are detached: it is reported and changes nothing",
    source="pitfalls 2, 9 in kind; losses logged and never added",
    by="router.balance",
)
def balance_loss_without_a_gradient() -> Iterator[None]:
    def wrong(balance_loss):
        return lambda scores, indices, valid: balance_loss(scores.detach(), indices, valid)

    with replaced("composeformer_moe.sigmoid_bias:balance_loss", wrong):
        yield


@mutant(
    "z-loss-without-a-square",
    "router",
    "softmax",
    "the log-sum-exps of the z-loss are not squared",
    source="arXiv 2202.08906, equation 5, misread",
)
def z_loss_without_a_square() -> Iterator[None]:
    def wrong(z_loss):
        def plain(logits, valid):
            found = logits.logsumexp(-1).abs()
            return (found if valid is None else found.masked_fill(~valid, 0)).sum()

        return plain

    with replaced("composeformer_moe.softmax:z_loss", wrong):
        yield


@mutant(
    "bias-moved-out-of-place",
    "router",
    "sigmoid-bias",
    "the bias is assigned anew: what was saved before holds zeros for ever",
    source="pitfalls 2, 5: TT#1222, PR1226",
)
def bias_moved_out_of_place() -> Iterator[None]:
    def wrong(after_step):
        def anew(self, totals, run):
            self.bias = self.bias.clone()
            return after_step(self, totals, run)

        return anew

    with replaced(f"{SIGMOID}.after_step", wrong):
        yield


@mutant(
    "loads-compared-in-floats",
    "router",
    "sigmoid-bias",
    "loads are compared with their mean in fp32, where large ones are equal",
    source="pitfalls 2, 4: MLM PR7081: the update's sign flips at about 40,000 tokens in bf16",
    by="router.after-step",
)
def loads_compared_in_floats() -> Iterator[None]:
    def wrong(after_step):
        def floats(self, totals, run):
            load = totals.get("load")
            if load is not None:
                load = load.float()
                self.bias.add_(torch.sign(load.mean() - load), alpha=run.value("bias_update_speed"))

        return floats

    with replaced(f"{SIGMOID}.after_step", wrong):
        yield


@mutant(
    "bias-moves-the-other-way",
    "router",
    "sigmoid-bias",
    "busy experts are made busier",
    source="load - mean for mean - load",
    by="router.after-step",
)
def bias_moves_the_other_way() -> Iterator[None]:
    def wrong(after_step):
        def other(self, totals, run):
            return after_step(self, {name: -load for name, load in totals.items()}, run)

        return other

    with replaced(f"{SIGMOID}.after_step", wrong):
        yield


@mutant(
    "bias-moves-by-the-violation",
    "router",
    "sigmoid-bias",
    "the bias moves in proportion to how far a load is from the mean, not by its sign",
    source="arXiv 2408.15664, the variant that it tries and drops",
    by="router.after-step",
)
def bias_moves_by_the_violation() -> Iterator[None]:
    def wrong(after_step):
        def proportional(self, totals, run):
            load = totals.get("load")
            if load is not None and bool(load.any()):
                relative = 1 - load.double() / load.double().mean()
                self.bias.add_(relative.to(self.bias.dtype), alpha=run.value("bias_update_speed"))

        return proportional

    with replaced(f"{SIGMOID}.after_step", wrong):
        yield


@mutant(
    "speed-never-scheduled",
    "router",
    "sigmoid-bias",
    "the bias moves by the config's speed, whatever is scheduled",
    source="V3 freezes its bias for the last 500B tokens; trials, walk 12",
    by="router.after-step",
)
def speed_never_scheduled() -> Iterator[None]:
    def wrong(after_step):
        def fixed(self, totals, run):
            import attrs

            return after_step(self, totals, attrs.evolve(run, values={}))

        return fixed

    with replaced(f"{SIGMOID}.after_step", wrong):
        yield
