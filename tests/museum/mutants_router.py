"""Bugs of routers: masked groups, biased weights, ties, precision, sums that are means, and biases that do not move."""

from collections.abc import Iterator

import torch
from museum_kit import mutant, replaced
from torch.nn import functional as F

GATE = "composeformer_moe.gate:Gate.logits"
SOFTMAX, SIGMOID = (
    "composeformer_moe.softmax:SoftmaxRouter",
    "composeformer_moe.sigmoid_bias:SigmoidBiasRouter",
)


@mutant(
    "weights-in-the-dtype-of-activations",
    "router",
    "softmax",
    "weights are cast to the dtype of the hidden states",
    source="routing_weights.to(hidden_states.dtype) of Mixtral in transformers and its many copies",
)
def weights_in_the_dtype_of_activations() -> Iterator[None]:
    def wrong(forward):
        def cast(self, x, batch):
            found = forward(self, x, batch)
            return found._replace(weights=found.weights.to(x.dtype))

        return cast

    with replaced(f"{SOFTMAX}.forward", wrong):
        yield


@mutant(
    "logits-centred-over-the-batch",
    "router",
    "sigmoid-bias",
    "logits lose their mean over the batch's tokens: balance by looking at the others",
    source="Sinkhorn and expert-choice routing of Megatron, whose choices depend on other tokens",
)
def logits_centred_over_the_batch() -> Iterator[None]:
    def wrong(logits):
        def centred(self, x):
            found = logits(self, x)
            return found - found.mean((0, 1), keepdim=True) if found.numel() else found

        return centred

    with replaced(GATE, wrong):
        yield


@mutant(
    "shifted-by-the-largest-of-all-tokens",
    "router",
    "softmax",
    "a softmax is kept from overflowing by the largest logit of the batch, not the token's",
    source="a reduction without a dim; one NaN spoils every token",
)
def shifted_by_the_largest() -> Iterator[None]:
    def wrong(logits):
        def shifted(self, x):
            found = logits(self, x)
            return found - found.detach().max() if found.numel() else found

        return shifted

    with replaced(GATE, wrong):
        yield


@mutant(
    "padding-in-the-balance-loss",
    "router",
    "softmax",
    "the balance loss counts padding",
    source="pitfalls 2, 10: MLM#1984; transformers before attention_mask entered load_balancing_loss_func",
)
def padding_in_the_balance_loss() -> Iterator[None]:
    def wrong(balance_loss):
        return lambda scores, indices, valid: balance_loss(scores, indices, None)

    with replaced("composeformer_moe.softmax:balance_loss", wrong):
        yield


@mutant(
    "z-loss-is-a-mean",
    "router",
    "softmax",
    "the z-loss is a mean over tokens, which micro-batches of unlike sizes add up wrongly",
    source="ST-MoE's equation 5 as it is written; TT PR2206 in kind",
)
def z_loss_is_a_mean() -> Iterator[None]:
    def wrong(z_loss):
        def mean(logits, valid):
            number = logits.shape[0] * logits.shape[1] if valid is None else int(valid.sum())
            return z_loss(logits, valid) / max(1, number)

        return mean

    with replaced("composeformer_moe.softmax:z_loss", wrong):
        yield


@mutant(
    "mean-over-no-tokens",
    "router",
    "softmax",
    "a loss is taken by a mean over real tokens, of which there may be none",
    source="pitfalls 2, end: all ignored gives NaN (AM#3796, OLMo-core PR657)",
)
def mean_over_no_tokens() -> Iterator[None]:
    def wrong(z_loss):
        def mean(logits, valid):
            real = logits.flatten(0, 1) if valid is None else logits[valid]
            return real.logsumexp(-1).square().mean() * len(real)

        return mean

    with replaced("composeformer_moe.softmax:z_loss", wrong):
        yield


@mutant(
    "losses-in-evaluation",
    "router",
    "softmax",
    "losses are given in prefill and decoding, too",
    source="pitfalls 2, 6: TT PR4148 in kind; auxiliary losses in evaluation of many ports",
)
def losses_in_evaluation() -> Iterator[None]:
    def wrong(forward):
        return lambda self, x, batch: forward(self, x, batch._replace(phase="train"))

    with replaced(f"{SOFTMAX}.forward", wrong):
        yield


@mutant(
    "normaliser-without-a-gradient",
    "router",
    "softmax",
    "the sum that weights are divided by is a constant to the backward pass",
    source="topk under no_grad, weights gathered and divided by its values",
)
def normaliser_without_a_gradient() -> Iterator[None]:
    def wrong(forward):
        def detached(self, x, batch):
            found = forward(self, x, batch)
            if not self.normalize:
                return found
            logits = self.logits(x).gather(-1, found.indices)
            weights = logits.exp() / logits.exp().sum(-1, keepdim=True).detach() * self.factor
            return found._replace(weights=weights)

        return detached

    with replaced(f"{SOFTMAX}.forward", wrong):
        yield


@mutant(
    "logits-in-bfloat16",
    "router",
    "sigmoid-bias",
    "logits are multiplied in the dtype of activations and cast to fp32 afterwards",
    source="pitfalls 2, 12; trials, walk 3: a router in a bf16 unit becomes bf16",
)
def logits_in_bfloat16() -> Iterator[None]:
    def wrong(logits):
        def narrow(self, x):
            found = F.linear(x, self.gate.matrix().to(x.dtype))
            return found.to(torch.promote_types(x.dtype, torch.float32))

        return narrow

    with replaced(GATE, wrong):
        yield


@mutant(
    "group-score-of-one-expert",
    "router",
    "sigmoid-bias",
    "groups are ranked by their best expert where the two best are meant",
    source="pitfalls 4, 5: V2's rule in V3; Megatron's topk // group_topk",
)
def group_score_of_one_expert() -> Iterator[None]:
    def wrong(in_best_groups):
        return lambda scores, groups, of, score: in_best_groups(scores, groups, of, "max")

    with replaced("composeformer_moe.sigmoid_bias:in_best_groups", wrong):
        yield


@mutant(
    "masked-groups-at-zero",
    "router",
    "sigmoid-bias",
    "experts outside the best groups score zero, which beats negative ones",
    source="pitfalls 2, 1: HF#45440, vllm PR13474, flashinfer#2168",
    by="router.groups",
)
def masked_groups_at_zero() -> Iterator[None]:
    def wrong(in_best_groups):
        def zeros(scores, *groups):
            found = in_best_groups(scores, *groups)
            return found.masked_fill(found.isneginf(), 0.0)

        return zeros

    with replaced("composeformer_moe.sigmoid_bias:in_best_groups", wrong):
        yield


@mutant(
    "groups-of-strided-experts",
    "router",
    "softmax",
    "experts are grouped by their number modulo the groups, not with their neighbours",
    source="view(groups, -1) and view(-1, groups) mixed up",
    by="router.groups",
)
def groups_of_strided_experts() -> Iterator[None]:
    def wrong(in_best_groups):
        def strided(scores, num_groups, *rest):
            def to(x):
                return x.unflatten(-1, (-1, num_groups)).transpose(-1, -2).flatten(-2)

            def back(x):
                return x.unflatten(-1, (num_groups, -1)).transpose(-1, -2).flatten(-2)

            return back(in_best_groups(to(scores), num_groups, *rest))

        return strided

    with replaced("composeformer_moe.softmax:in_best_groups", wrong):
        yield


@mutant(
    "ties-to-the-highest",
    "router",
    "softmax",
    "among equal scores the highest index is chosen",
    source="pitfalls 2, 12: PT#127196, TT#3336, AM PR3140: topk promises no order",
)
def ties_to_the_highest() -> Iterator[None]:
    def wrong(best):
        return lambda scores, k: scores.shape[-1] - 1 - best(scores.flip(-1), k)

    with replaced("composeformer_moe.softmax:best", wrong):
        yield


@mutant(
    "many-scores-sorted-unstably",
    "router",
    "softmax",
    "what sorts many scores at once forgets the index behind equal ones",
    source="pitfalls 2, 12: a path that only large batches take",
    by="router.exact-top-k",
)
def many_scores_sorted_unstably() -> Iterator[None]:
    def wrong(ranks):
        def reversed_ties(scores):
            experts = scores.shape[-1]
            return ranks(scores).div(experts, rounding_mode="floor") * experts + torch.arange(experts)

        return reversed_ties

    with replaced("composeformer_moe.choice:ranks", wrong):
        yield


@mutant(
    "weights-of-biased-scores",
    "router",
    "sigmoid-bias",
    "weights are gathered from the scores with the bias",
    source="pitfalls 2, 2: HF PR41647, PR41663",
)
def weights_of_biased_scores() -> Iterator[None]:
    def wrong(forward):
        def gathered(self, x, batch):
            found = forward(self, x, batch)
            scores = (self.logits(x).sigmoid() + self.bias).gather(-1, found.indices)
            if self.normalize:
                scores = scores / scores.sum(-1, keepdim=True)
            return found._replace(weights=scores * self.factor)

        return gathered

    with replaced(f"{SIGMOID}.forward", wrong):
        yield


@mutant(
    "bias-left-out-of-the-choice",
    "router",
    "sigmoid-bias",
    "the bias moves and is never read",
    source="pitfalls 2, 11: maxtext#2494, EfficientMoE#3",
    by="router.groups",
)
def bias_left_out_of_the_choice() -> Iterator[None]:
    def wrong(forward):
        def unread(self, x, batch):
            bias = self.bias.clone()
            self.bias.zero_()
            try:
                return forward(self, x, batch)
            finally:
                self.bias.copy_(bias)

        return unread

    with replaced(f"{SIGMOID}.forward", wrong):
        yield


@mutant(
    "factor-only-when-normalised",
    "router",
    "sigmoid-bias",
    "the scaling factor is nested below the normalisation",
    source="pitfalls 2, 3: sglang-jax PR1282, sglang PR8511; vllm PR45037",
)
def factor_only_when_normalised() -> Iterator[None]:
    def wrong(forward):
        def nested(self, x, batch):
            found = forward(self, x, batch)
            return found if self.normalize else found._replace(weights=found.weights / self.factor)

        return nested

    with replaced(f"{SIGMOID}.forward", wrong):
        yield


@mutant(
    "sum-of-weights-underflows",
    "router",
    "sigmoid-bias",
    "sigmoids are divided by their sum plus 1e-20, which is all there is where they underflow",
    source="pitfalls 4, 7: the 1e-20 of transformers' deepseek_v3",
)
def sum_of_weights_underflows() -> Iterator[None]:
    def wrong(forward):
        def divided(self, x, batch):
            found = forward(self, x, batch)
            if not self.normalize:
                return found
            scores = self.logits(x).sigmoid().gather(-1, found.indices)
            return found._replace(weights=scores / (scores.sum(-1, keepdim=True) + 1e-20) * self.factor)

        return divided

    with replaced(f"{SIGMOID}.forward", wrong):
        yield


@mutant(
    "normalised-over-all-experts",
    "router",
    "sigmoid-bias",
    "weights are shares of all experts' scores, not of the chosen ones'",
    source="norm_topk_prob read as a softmax before the choice: Qwen2-MoE against Mixtral",
    by="router.normalised",
)
def normalised_over_all_experts() -> Iterator[None]:
    def wrong(forward):
        def shares(self, x, batch):
            found = forward(self, x, batch)
            scores = self.logits(x).sigmoid()
            shares = scores / scores.sum(-1, keepdim=True)
            return found._replace(weights=shares.gather(-1, found.indices) * self.factor)

        return shares

    with replaced(f"{SIGMOID}.forward", wrong):
        yield


@mutant(
    "exponentials-overflow",
    "router",
    "softmax",
    "a softmax is the exponentials over their sum, and overflows",
    source="fused routing kernels that leave out the maximum",
)
def exponentials_overflow() -> Iterator[None]:
    def wrong(forward):
        def plain(self, x, batch):
            found = forward(self, x, batch)
            logits = self.logits(x)
            chosen = logits.gather(-1, found.indices).exp()
            whole = (chosen if self.normalize else logits.exp()).sum(-1, keepdim=True)
            return found._replace(weights=chosen / whole * self.factor)

        return plain

    with replaced(f"{SOFTMAX}.forward", wrong):
        yield


@mutant(
    "softmax-at-another-temperature",
    "router",
    "softmax",
    "logits are divided by the root of the width",
    source="a scale of attention, copied into a gate",
)
def softmax_at_another_temperature() -> Iterator[None]:
    def wrong(logits):
        return lambda self, x: logits(self, x) / x.shape[-1] ** 0.5

    with replaced(GATE, wrong):
        yield


@mutant(
    "softmax-for-sigmoids",
    "router",
    "sigmoid-bias",
    "scores are a softmax, as V2's are, where V3's are sigmoids",
    source="scoring_func left out of a config: DeepSeek-V2 code given V3's weights",
)
def softmax_for_sigmoids() -> Iterator[None]:
    def wrong(logits):
        # The sigmoid of these logits is the softmax of the others.
        return lambda self, x: logits(self, x).softmax(-1).logit()

    with replaced(GATE, wrong):
        yield
