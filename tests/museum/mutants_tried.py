"""Bugs that nobody is known to have shipped: thought of to try the laws, which did not tell them at first."""

from collections.abc import Iterator

import attrs
import torch
from museum_kit import mutant, replaced

from composeformer.contracts import Core
from composeformer.errors import InputError
from composeformer.tensors import Aux
from composeformer_fp8.quantise import dequantise
from composeformer_mtp.drafting import Drafting

TRIED = "tried against the laws"
GQA = "composeformer_dense.configs.attention:GQA"
MTP = "composeformer_mtp.module:MultiTokenPrediction"
MOE = "composeformer_moe.reference:MixtureOfExperts"
BLOCK = 128


@mutant("negative-features-are-squared", "ffn", "swiglu", "relu2 squares what is below zero", source=TRIED)
def negative_features_are_squared() -> Iterator[None]:
    made = {"relu2": torch.square}
    with replaced("composeformer_dense.ffn:ACTIVATIONS", lambda every: {**every, **made}):
        yield


@mutant(
    "shared-experts-by-another-activation", "ffn", "moe", "shared experts have gelu for silu", source=TRIED
)
def shared_experts_by_another_activation() -> Iterator[None]:
    def wrong(shared):
        def gelu(self, x):
            return self.shared_down(torch.nn.functional.gelu(self.shared_gate(x)) * self.shared_up(x))

        return gelu

    with replaced(f"{MOE}.shared", wrong):
        yield


@mutant("violation-over-the-sum", "ffn", "moe", "an even load is told as an uneven one", source=TRIED)
def violation_over_the_sum() -> Iterator[None]:
    def wrong(after_step):
        def told(self, totals, run):
            found = after_step(self, totals, run)
            return {name: (value + 1) / self.num_experts - 1 for name, value in found.items()}

        return told

    with replaced(f"{MOE}.after_step", wrong):
        yield


@mutant("groups-start-alike", "ffn", "moe", "all experts start with the same values", source=TRIED)
def groups_start_alike() -> Iterator[None]:
    with replaced(
        "composeformer.init:_draw", lambda draw: lambda value, std, key: draw(value, std, key.split("/")[0])
    ):
        yield


@mutant("groups-scored-by-logits", "router", "softmax", "the sum of two is that of logits", source=TRIED)
def groups_scored_by_logits() -> Iterator[None]:
    def wrong(init):
        def made(self, config, site):
            init(self, config, site)
            self.by_sum = False

        return made

    with replaced("composeformer_moe.softmax:SoftmaxRouter.__init__", wrong):
        yield


@mutant("bias-read-in-bfloat16", "router", "sigmoid-bias", "steps of the bias are lost", source=TRIED)
def bias_read_in_bfloat16() -> Iterator[None]:
    def wrong(forward):
        def narrow(self, x, batch):
            bias = self.bias
            self.bias = bias.bfloat16().float()
            found = forward(self, x, batch)
            self.bias = bias
            return found

        return narrow

    with replaced("composeformer_moe.sigmoid_bias:SigmoidBiasRouter.forward", wrong):
        yield


@mutant(
    "moments-swap-their-decays",
    "optimizer",
    "adamw",
    "narrow moments have each the other's",
    source=TRIED,
    by="optimizer.adam",
)
def moments_swap_their_decays() -> Iterator[None]:
    def wrong(init):
        return lambda self, groups, lr, betas, eps: init(self, groups, lr, betas[::-1], eps)

    with replaced("composeformer_training.moments:MomentAdamW.__init__", wrong):
        yield


@mutant(
    "scales-of-the-first-slab",
    "codec",
    "f8-128x128",
    "what is decoded in a second step has the scales of the first",
    source=TRIED,
)
def scales_of_the_first_slab() -> Iterator[None]:
    def wrong(decode):
        def slabs(codes, scales, out, start, stop):
            slab = BLOCK * max(1, 2**17 // (BLOCK * codes.shape[1]))
            for first in range(start // BLOCK * BLOCK, stop, slab):
                low, high = max(first, start), min(first + slab, stop)
                held = scales[start // BLOCK : -(-high // BLOCK)]
                value = dequantise(codes[first:high], held.float(), (BLOCK, BLOCK))
                out[low - start : high - start] = value[low - first :]

        return slabs

    with replaced("composeformer_fp8.codec_blocks:_decode", wrong):
        yield


@mutant(
    "predictor-drops-its-side-results", "predictor", "mtp", "loads of its experts are not told", source=TRIED
)
def predictor_drops_its_side_results() -> Iterator[None]:
    def wrong(forward):
        def silent(self, stream, hidden, batch):
            return [each._replace(aux=Aux()) for each in forward(self, stream, hidden, batch)]

        return silent

    with replaced(f"{MTP}.forward", wrong):
        yield


@mutant("predictor-runs-in-prefill", "predictor", "mtp", "its layers do not know of training", source=TRIED)
def predictor_runs_in_prefill() -> Iterator[None]:
    def wrong(forward):
        return lambda self, stream, hidden, batch: forward(
            self, stream, hidden, batch._replace(phase="prefill")
        )

    with replaced(f"{MTP}.forward", wrong):
        yield


@mutant("predictor-checks-the-last-link", "predictor", "mtp", "padding between is passed over", source=TRIED)
def predictor_checks_the_last_link() -> Iterator[None]:
    def wrong(reach):
        return lambda batch, valid, length: reach(batch, batch.valid, length)

    with replaced("composeformer_mtp.module:reach", wrong):
        yield


@mutant(
    "predictor-caches-hold-no-drafts", "predictor", "mtp", "a row that rests leaves no room", source=TRIED
)
def predictor_caches_hold_no_drafts() -> Iterator[None]:
    def wrong(new_cache):
        def tight(self, batch_size, max_length):
            mixers = [depth.mixer for depth in self.depths]
            caches = [m and m.new_cache(batch_size, max_length, k) for k, m in enumerate(mixers)]
            return Drafting(caches, batch_size, next(self.parameters()).device)

        return tight

    with replaced(f"{MTP}.new_cache", wrong):
        yield


@mutant("ramp-without-a-width", "position", "yarn", "a ramp between equal bounds is 0 / 0", source=TRIED)
def ramp_without_a_width() -> Iterator[None]:
    def wrong(bounds):
        def equal(self):
            low, high = bounds(self)
            return (low, low) if high - low < 0.01 else (low, high)

        return equal

    with replaced("composeformer_dense.rotary:YarnRope.bounds", wrong):
        yield


@mutant("core-costs-without-its-window", "mixer", "gqa", "a window costs what all tokens do", source=TRIED)
def core_costs_without_its_window() -> Iterator[None]:
    def wrong(cost):
        def whole(self, site, phase):
            for each in cost(self, site, phase):
                yield attrs.evolve(each, window=None) if isinstance(each, Core) else each

        return whole

    with replaced(f"{GQA}.cost", wrong):
        yield


@mutant("values-without-their-bias", "mixer", "gqa", "qkv_bias gives values none", source=TRIED)
def values_without_their_bias() -> Iterator[None]:
    def wrong(tensors):
        def lacking(self, site):
            for each in tensors(self, site):
                yield attrs.evolve(each, bias=False) if getattr(each, "name", "") == "v" else each

        return lacking

    with replaced(f"{GQA}.tensors", wrong):
        yield


@mutant(
    "scaled-by-what-is-padded",
    "mixer",
    "mla",
    "scores are scaled by the width of padded values",
    source=TRIED,
    implementation="expanded",
)
def scaled_by_what_is_padded() -> Iterator[None]:
    def wrong(attention):
        return lambda *given, scale, **more: attention(*given, **more)

    with replaced("composeformer_attention_mla.expanded:scaled_dot_product_attention", wrong):
        yield


@mutant("rollback-beyond-the-ring", "mixer", "gqa", "what a ring overwrote is taken for there", source=TRIED)
def rollback_beyond_the_ring() -> Iterator[None]:
    def wrong(rolled_back):
        def each_alone(counts, lengths, longest, max_rollback):
            if bool(((counts < 0) | (counts > max_rollback) | (counts > lengths)).any()):
                raise InputError(f"cannot roll back {counts.tolist()}")
            return lengths - counts, torch.maximum(longest, lengths)

        return each_alone

    with (
        replaced("composeformer.cache:rolled_back", wrong),
        replaced("composeformer.model_cache:rolled_back", wrong),
    ):
        yield


@mutant(
    "links-by-place-in-the-node",
    "comm",
    "collective",
    "ranks of one place in their nodes are near",
    source=TRIED,
)
def links_by_place_in_the_node() -> Iterator[None]:
    def wrong(link):
        def near(self, rank, other):
            same = rank % self.size == other % self.size
            return "self" if rank == other else "intra" if same else "inter"

        return near

    with replaced("composeformer_comm.hops:Hop.link", wrong):
        yield


@mutant(
    "expected-visits-every-node",
    "comm",
    "hierarchical",
    "nodes are visited whatever their limit",
    source=TRIED,
)
def expected_visits_every_node() -> Iterator[None]:
    def wrong(links):
        def always(config, hop, sizes, k, nodes):
            chance = 1.0 if nodes is None else nodes * hop.size / sizes.ranks
            return {link: rows / chance for link, rows in links(config, hop, sizes, k, nodes).items()}

        return always

    with replaced("composeformer_comm.means:_links", wrong):
        yield


@mutant(
    "unwritten-slots-of-a-ring-are-seen",
    "mixer",
    "gqa",
    "a short row sees slots of a ring that it never wrote",
    source=TRIED,
    by="mixer.garbage",
)
def unwritten_slots_of_a_ring_are_seen() -> Iterator[None]:
    def wrong(visible):
        return lambda *given, holes=True: visible(*given, holes=False)

    with replaced("composeformer.cache:visible", wrong):
        yield
