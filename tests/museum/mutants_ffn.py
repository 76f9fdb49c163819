"""Bugs of feed-forward networks and of mixtures of experts: padding, counts, capacity, weights, idle experts."""

from collections.abc import Iterator

import torch
from museum_kit import mutant, replaced
from torch.nn import functional as F

from composeformer.tensors import Routing

MOE = "composeformer_moe.reference:MixtureOfExperts"


@mutant(
    "tokens-beyond-a-capacity-are-dropped",
    "ffn",
    "moe",
    "an expert takes no more than a capacity of the batch's tokens; what else chose it is dropped",
    source="pitfalls 2, near 13; Switch Transformer's capacity factor, left on in evaluation by many ports",
)
def tokens_beyond_a_capacity() -> Iterator[None]:
    def wrong(experts):
        def capped(self, rows, counts):
            found = experts(self, rows, counts)
            capacity = max(1, -(-len(rows) // self.num_experts))
            starts = counts.cumsum(0) - counts
            owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
            place = torch.arange(len(owner)) - starts[owner]
            kept = F.pad(place < capacity, (0, len(rows) - len(owner)), value=False)
            return found * kept[:, None]

        return capped

    with replaced(f"{MOE}.experts", wrong):
        yield


@mutant(
    "scaled-by-the-largest-of-all-tokens",
    "ffn",
    "swiglu",
    "activations are divided by the batch's largest magnitude and multiplied by it again, as one scale a tensor does",
    source="per-tensor activation scales of FP8 recipes; one NaN or outlier spoils every token (pitfalls 2, 22)",
)
def scaled_by_the_largest() -> Iterator[None]:
    def wrong(forward):
        def scaled(self, x, batch):
            if not x.numel():
                return forward(self, x, batch)
            real = x if batch.valid is None else x[batch.valid]
            largest = real.detach().abs().max().clamp(min=1) if real.numel() else 1
            return forward(self, (x / largest) * largest, batch)

        return scaled

    with replaced("composeformer_dense.ffn:FeedForward.forward", wrong):
        yield


@mutant(
    "padding-is-routed",
    "ffn",
    "moe",
    "padding chooses experts and is counted in their loads",
    source="pitfalls 2, 10: MLM#1984, TT PR4594, sglang PR26133",
)
def padding_is_routed() -> Iterator[None]:
    def wrong(forward):
        def blind(self, x, batch):
            if batch.valid is not None:
                x = x.masked_fill(~batch.valid[:, :, None], 0)
            return forward(self, x, batch._replace(valid=None))

        return blind

    with replaced(f"{MOE}.forward", wrong):
        yield


@mutant(
    "padding-enters-as-it-is",
    "ffn",
    "swiglu",
    "padding is multiplied by no mask: what it holds reaches the weights' gradients as 0 x NaN",
    source="pitfalls 2, 14: 0 x NaN; HF PR48205",
    by="ffn.padding",
)
def padding_enters_as_it_is() -> Iterator[None]:
    def wrong(forward):
        return lambda self, x, batch: forward(self, x, batch._replace(valid=None))

    with replaced("composeformer_dense.ffn:FeedForward.forward", wrong):
        yield


@mutant(
    "balance-over-the-whole-batch",
    "ffn",
    "moe",
    "the balance loss takes its shares over the batch: micro-batches do not add",
    source="trials, walk 12: transformers' load_balancing_loss_func of Mixtral and Qwen3-MoE",
)
def balance_over_the_whole_batch() -> Iterator[None]:
    def wrong(balance_loss):
        def flat(scores, indices, valid):
            one_row = None if valid is None else valid.reshape(1, -1)
            return balance_loss(scores.flatten(0, 1)[None], indices.flatten(0, 1)[None], one_row)

        return flat

    with (
        replaced("composeformer_moe.softmax:balance_loss", wrong),
        replaced("composeformer_moe.sigmoid_bias:balance_loss", wrong),
    ):
        yield


@mutant(
    "no-tokens-no-graph",
    "ffn",
    "moe",
    "without tokens the output is a new empty tensor, and the backward pass fails",
    source="pitfalls 2, 13: AM PR935, PaddleFormers PR3010, MLM PR4851",
)
def no_tokens_no_graph() -> Iterator[None]:
    def wrong(experts):
        def shortcut(self, rows, counts):
            if not bool(counts.any()):
                return torch.empty(rows.shape, dtype=rows.dtype)
            return experts(self, rows, counts)

        return shortcut

    with replaced(f"{MOE}.experts", wrong):
        yield


@mutant(
    "counts-in-half-precision",
    "ffn",
    "moe",
    "loads are summed in bfloat16",
    source="pitfalls 2, 4: MLM#1482, MLM PR7081",
)
def counts_in_half_precision() -> Iterator[None]:
    def wrong(loads):
        return lambda indices, num_experts: loads(indices, num_experts).bfloat16()

    with replaced("composeformer_moe.reference:loads", wrong):
        yield


@mutant(
    "counts-in-evaluation",
    "ffn",
    "moe",
    "loads are counted in prefill and decoding, too",
    source="pitfalls 2, 6: TT PR4148",
)
def counts_in_evaluation() -> Iterator[None]:
    def wrong(forward):
        return lambda self, x, batch: forward(self, x, batch._replace(phase="train"))

    with replaced(f"{MOE}.forward", wrong):
        yield


@mutant(
    "decoding-forgets-the-shared-experts",
    "ffn",
    "moe",
    "the path for single tokens leaves out the shared experts",
    source="a second path that drifted from the first: sglang and vllm fused shared experts",
    implementation="batched",
    by="ffn.phases",
)
def decoding_forgets_the_shared_experts() -> Iterator[None]:
    def wrong(forward):
        def forgetful(self, x, batch):
            found = forward(self, x, batch)
            if batch.phase != "decode" or not self.has_shared:
                return found
            return found._replace(hidden=found.hidden - self.shared(x))

        return forgetful

    with replaced(f"{MOE}.forward", wrong):
        yield


@mutant(
    "weights-without-a-gradient",
    "ffn",
    "moe",
    "routing weights are detached on the way: the router learns from its losses alone",
    source="top-k under no_grad; in the style of maxtext#2494 and HF PR35926",
)
def weights_without_a_gradient() -> Iterator[None]:
    def wrong(forward):
        def detached(self, x, batch):
            router = type(self.router).forward

            def route(*args, **kwargs):
                found = router(self.router, *args, **kwargs)
                return found._replace(weights=found.weights.detach())

            self.router.__dict__["forward"] = route
            try:
                return forward(self, x, batch)
            finally:
                del self.router.__dict__["forward"]

        return detached

    with replaced(f"{MOE}.forward", wrong):
        yield


@mutant(
    "weights-enter-the-experts",
    "ffn",
    "moe",
    "tokens are multiplied by their weights before their experts, not after",
    source="apply_router_weight_on_input of fused kernels (vllm, Llama 4), taken for other models",
)
def weights_enter_the_experts() -> Iterator[None]:
    def wrong(exchange):
        def before(self, x, routing, experts, beside=None):
            total = None
            for k in range(routing.indices.shape[-1]):
                index, weight = routing.indices[..., k : k + 1], routing.weights[..., k : k + 1]
                weight = weight.masked_fill(index == self.groups, 0)
                one = Routing(index, torch.ones_like(weight))
                found, _ = exchange(self, (x * weight).to(x.dtype), one, experts)
                total = found if total is None else total + found
            return total, None if beside is None else beside()

        return before

    with replaced("composeformer_comm.local:LocalExchange.exchange", wrong):
        yield


@mutant(
    "garbage-for-idle-experts",
    "ffn",
    "moe",
    "gradients of experts without tokens are memory as it was found",
    source="pitfalls 2, 14: PT#172439, PT#154557",
    implementation="batched",
)
def garbage_for_idle_experts() -> Iterator[None]:
    class Garbage(torch.autograd.Function):
        @staticmethod
        def forward(ctx, found, matrix, counts):
            ctx.save_for_backward(counts)
            ctx.shape = matrix.shape
            return found.clone()

        @staticmethod
        def backward(ctx, gradient):
            (counts,) = ctx.saved_tensors
            garbage = gradient.new_zeros(ctx.shape)
            garbage[counts == 0] = 1e-3
            return gradient, garbage, None

    def wrong(experts):
        return lambda self, rows, counts: Garbage.apply(experts(self, rows, counts), self.up.matrix(), counts)

    with replaced("composeformer_moe.batched:Batched.experts", wrong):
        yield


@mutant(
    "rows-past-the-last-are-not-written",
    "ffn",
    "moe",
    "rows past the last expert's are left as they were found, and multiplied by zero",
    source="pitfalls 2, 14: PT#154557, PT#193633, TT#1237",
    implementation="grouped",
    by="ffn.padding",
)
def rows_past_the_last() -> Iterator[None]:
    def wrong(experts):
        def unwritten(self, rows, counts):
            found = experts(self, rows, counts)
            beyond = torch.arange(len(rows)) >= counts.sum()
            return torch.where(beyond[:, None], torch.empty_like(found), found)

        return unwritten

    with replaced("composeformer_moe.grouped:Grouped.experts", wrong):
        yield


@mutant(
    "factor-applied-twice",
    "ffn",
    "moe",
    "the router's weights hold the scaling factor already, and the layer multiplies by it again",
    source="pitfalls 2, 3: vllm PR24119, vllm PR45037, sglang PR8511",
)
def factor_applied_twice() -> Iterator[None]:
    def wrong(forward):
        def scaled(self, x, batch):
            found = forward(self, x, batch)
            if not self.has_shared:
                return found._replace(hidden=found.hidden * self.router.factor)
            shared = self.shared(x if batch.valid is None else x.masked_fill(~batch.valid[:, :, None], 0))
            return found._replace(hidden=(found.hidden - shared) * self.router.factor + shared)

        return scaled

    with replaced(f"{MOE}.forward", wrong):
        yield


@mutant(
    "shared-experts-take-the-factor",
    "ffn",
    "moe",
    "the scaling factor multiplies the sum, shared experts with it",
    source="pitfalls 2, 3: sglang PR35152, PR28237",
    by="ffn.scaling-factor",
)
def shared_experts_take_the_factor() -> Iterator[None]:
    def wrong(shared):
        return lambda self, x: shared(self, x) * self.router.factor

    with replaced(f"{MOE}.shared", wrong):
        yield


@mutant(
    "loads-of-first-choices",
    "ffn",
    "moe",
    "only a token's first expert is counted",
    source="Switch Transformer's count with k = 1, kept for top-k: Mixtral ports",
)
def loads_of_first_choices() -> Iterator[None]:
    def wrong(loads):
        return lambda indices, num_experts: loads(indices[..., :1], num_experts)

    with replaced("composeformer_moe.reference:loads", wrong):
        yield


@mutant(
    "each-forward-moves-the-bias",
    "ffn",
    "moe",
    "the balancing bias moves in every forward pass: once a micro-batch, in evaluation, and again in recomputation",
    source="pitfalls 2, 6 to 8: TT PR4148, TT PR1304, TT PR1593, AM PR3247",
    by="everywhere.stateless",
)
def each_forward_moves_the_bias() -> Iterator[None]:
    def wrong(forward):
        def moving(self, x, batch):
            found = forward(self, x, batch)
            load = next(iter(found.aux.counts.values()), None)
            bias = getattr(self.router, "bias", None)
            if load is not None and bias is not None:
                bias.add_(torch.sign(load.sum() - load * self.num_experts).to(bias.dtype), alpha=0.125)
            return found

        return moving

    with replaced(f"{MOE}.forward", wrong):
        yield


@mutant(
    "experts-mixed-with-their-neighbours",
    "ffn",
    "moe",
    "the stack of one map is read one expert off",
    source="pitfalls 2, 21: sglang PR29727; flattened stacks of experts",
)
def experts_mixed_with_their_neighbours() -> Iterator[None]:
    def wrong(experts):
        def shifted(self, rows, counts):
            up, self.up = self.up, Rolled(self.up)
            try:
                return experts(self, rows, counts)
            finally:
                self.up = up

        return shifted

    class Rolled(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def matrix(self):
            return self.linear.matrix().roll(1, 0)

    with replaced(f"{MOE}.experts", wrong):
        yield


@mutant(
    "gelu-by-its-approximation",
    "ffn",
    "swiglu",
    "gelu is computed by tanh",
    source="gelu, gelu_new and gelu_pytorch_tanh mixed up: Gemma's hidden_act in transformers",
)
def gelu_by_its_approximation() -> Iterator[None]:
    def wrong(activations):
        return {**activations, "gelu": activations["gelu_tanh"]}

    with replaced("composeformer_dense.ffn:ACTIVATIONS", wrong):
        yield


@mutant(
    "silu-on-the-other-map",
    "ffn",
    "moe",
    "silu is of the up map, and the gate multiplies",
    source="w1 and w3 mixed up: Mixtral's names in many ports",
)
def silu_on_the_other_map() -> Iterator[None]:
    def wrong(experts):
        def swapped(self, rows, counts):
            self.gate, self.up = self.up, self.gate
            try:
                return experts(self, rows, counts)
            finally:
                self.gate, self.up = self.up, self.gate

        return swapped

    with replaced(f"{MOE}.experts", wrong):
        yield
