"""Bugs of rotary positions: layouts, tables that are cast, extensions of the context."""

from collections.abc import Iterator

import attrs
import torch
from museum_kit import mutant, replaced
from torch import nn

from composeformer.tensors import Rotary

ROTARY = "composeformer_dense.rotary"
POSITIONS = "composeformer_dense.configs.position"


@mutant(
    "rope-frequencies-cast-with-the-model",
    "position",
    "rope",
    "frequencies are a buffer, which a cast of the model to bfloat16 rounds",
    source="pitfalls 2.19: AM PR2549, HF#45902, TT#4783",
)
def rope_frequencies_cast_with_the_model() -> Iterator[None]:
    def wrong(forward):
        def cached(self, positions):
            if not hasattr(self, "inv_freq"):
                self.inv_freq = nn.Buffer(self.frequencies(positions.device), persistent=False)
            angles = positions[..., None].float() * self.inv_freq.float()
            return Rotary(angles.cos() * self.amplitude, angles.sin() * self.amplitude)

        return cached

    with replaced(f"{ROTARY}:Rope.forward", wrong):
        yield


@mutant(
    "rope-positions-in-half-precision",
    "position",
    "rope",
    "positions are rounded to bfloat16: beyond 256 neighbours share one",
    source="pitfalls 2.19: `torch.arange(..., dtype=hidden.dtype)`; tt-metal#54516",
)
def rope_positions_in_half_precision() -> Iterator[None]:
    def wrong(forward):
        return lambda self, positions: forward(self, positions.bfloat16())

    with replaced(f"{ROTARY}:Rope.forward", wrong):
        yield


@mutant(
    "rope-angles-in-half-precision",
    "position",
    "yarn",
    "the angle, not the position, is rounded to bfloat16 under autocast",
    source="pitfalls 2.19: rotary embeddings inside autocast, HF PR 25740 and others",
)
def rope_angles_in_half_precision() -> Iterator[None]:
    def wrong(forward):
        def rounded(self, positions):
            angles = (positions[..., None].float() * self.frequencies(positions.device)).bfloat16().float()
            return Rotary(angles.cos() * self.amplitude, angles.sin() * self.amplitude)

        return rounded

    with replaced(f"{ROTARY}:Rope.forward", wrong):
        yield


@mutant(
    "rope-tables-cast-to-the-heads",
    "position",
    "rope",
    "cos and sin are cast to the dtype of queries and keys before they multiply",
    source="pitfalls 2.19: `cos.to(q.dtype)`, usual in ports",
)
def rope_tables_cast_to_the_heads() -> Iterator[None]:
    def wrong(rotate):
        def cast(self, x, rotary, inverse=False):
            return rotate(self, x, Rotary(*(table.to(x.dtype) for table in rotary)), inverse)

        return cast

    with replaced(f"{ROTARY}:Rope.rotate", wrong):
        yield


@mutant(
    "rope-stretched-by-what-it-sees",
    "position",
    "rope",
    "the base grows with the longest position of a forward: cached keys keep another one",
    source="dynamic NTK scaling in decoding: HF#25104",
)
def rope_stretched_by_what_it_sees() -> Iterator[None]:
    def wrong(forward):
        def dynamic(self, positions):
            longest = positions.max().clamp(min=1).float()
            angles = positions[..., None].float() * self.frequencies(positions.device)
            angles = angles / (longest / 4096).clamp(min=1)
            return Rotary(angles.cos() * self.amplitude, angles.sin() * self.amplitude)

        return dynamic

    with replaced(f"{ROTARY}:Rope.forward", wrong):
        yield


@mutant(
    "rope-layouts-mixed-up",
    "position",
    "rope",
    "heads laid out in neighbouring pairs are turned as halves, and the other way round",
    source="pitfalls 2.18 and 4.1: HF#48648, HF#39687, mlx-lm#512, vllm#26995",
)
def rope_layouts_mixed_up() -> Iterator[None]:
    def wrong(init):
        def other(self, config, site):
            init(self, config, site)
            self.interleaved = not self.interleaved

        return other

    with replaced(f"{ROTARY}:Rope.__init__", wrong):
        yield


@mutant(
    "rope-turns-backwards",
    "position",
    "rope",
    "the sine has the other sign: the same scores for mirrored distances, other than any trained weights expect",
    source="sign of `rotate_half` mixed up on conversion",
)
def rope_turns_backwards() -> Iterator[None]:
    def wrong(forward):
        def mirrored(self, positions):
            cos, sin = forward(self, positions)
            return Rotary(cos, -sin)

        return mirrored

    with replaced(f"{ROTARY}:Rope.forward", wrong):
        yield


@mutant(
    "rope-turns-keys-and-queries-apart",
    "position",
    "rope",
    "tables repeated for neighbouring pairs multiply heads laid out in halves",
    source="pitfalls 2.18: `repeat_interleave` beside `rotate_half`",
)
def rope_turns_keys_and_queries_apart() -> Iterator[None]:
    def wrong(rotate):
        def repeated(self, x, rotary, inverse=False):
            if inverse or self.interleaved:
                return rotate(self, x, rotary, inverse)
            cos, sin = (table[:, :, None].repeat_interleave(2, -1) for table in rotary)
            turned, rest = x[..., : self.width], x[..., self.width :]
            a, b = turned.chunk(2, -1)
            turned = turned * cos + torch.cat([-b, a], -1) * sin
            return torch.cat([turned.to(x.dtype), rest], -1)

        return repeated

    with replaced(f"{ROTARY}:Rope.rotate", wrong):
        yield


@mutant(
    "rope-turns-the-last-features",
    "position",
    "rope",
    "with a fraction the last features turn, not the first",
    source="partial rotary factor of other families",
)
def rope_turns_the_last_features() -> Iterator[None]:
    def wrong(rotate):
        def last(self, x, rotary, inverse=False):
            if self.width == x.shape[-1]:
                return rotate(self, x, rotary, inverse)
            return rotate(self, x.flip(-1), rotary, inverse).flip(-1)

        return last

    with replaced(f"{ROTARY}:Rope.rotate", wrong):
        yield


@mutant(
    "rope-wavelengths-of-the-whole-head",
    "position",
    "rope",
    "with a fraction wavelengths are spread over the whole head, not over the features that turn",
    source="partial rotary factor: `arange(0, head_dim, 2) / head_dim`, phi and glm ports",
)
def rope_wavelengths_of_the_whole_head() -> Iterator[None]:
    def wrong(wavelengths):
        def spread(self, device):
            return wavelengths(self, device) ** self.config.fraction

        return spread

    with replaced(f"{ROTARY}:Rope.wavelengths", wrong):
        yield


@mutant(
    "rope-inverse-keeps-the-scale",
    "position",
    "yarn",
    "turning back divides by nothing, so that YaRN's scale is applied twice",
    source="inverse rotations of compressed keys (trials, walk 5)",
)
def rope_inverse_keeps_the_scale() -> Iterator[None]:
    def wrong(rotate):
        def kept(self, x, rotary, inverse=False):
            if not inverse:
                return rotate(self, x, rotary)
            return rotate(self, x, Rotary(rotary.cos, -rotary.sin))

        return kept

    with replaced(f"{ROTARY}:Rope.rotate", wrong):
        yield


@mutant(
    "rope-of-an-odd-width",
    "position",
    "rope",
    "an odd number of features is accepted, and the last of them lost",
    source="pitfalls 2.18: odd dim accepted, sglang PR13495",
)
def rope_of_an_odd_width() -> Iterator[None]:
    with replaced(f"{POSITIONS}:Rope.validate", lambda _: lambda self, site: ()):
        yield


@mutant(
    "rope-tables-under-one-name",
    "position",
    "rope",
    "all positions of a model write their tables under one key: the last one's serve every layer",
    source="one rotary module for local and global layers, Gemma 3 ports",
)
def rope_tables_under_one_name() -> Iterator[None]:
    def wrong(module):
        def one(self, node):
            made = module(self, node)
            if node.slot == "position":
                self.tables.clear()
                made.key = "rope"
                self.tables["rope"] = made
            return made

        return one

    with replaced("composeformer.assemble:Builder.module", wrong):
        yield


@mutant(
    "rope-theta-is-its-own",
    "position",
    "rope",
    "theta is 10000, whatever the config says",
    source="`rope_theta` unread: CodeLlama in early ports; the key moved in HF v5, pitfalls 2.17",
)
def rope_theta_is_its_own() -> Iterator[None]:
    def wrong(wavelengths):
        def own(self, device):
            return 10000.0 ** (torch.arange(0, self.width, 2, device=device).float() / self.width)

        return own

    with replaced(f"{ROTARY}:Rope.wavelengths", wrong):
        yield


@mutant(
    "rope-multiplies-by-the-factor",
    "position",
    "linear",
    "frequencies are multiplied by the factor",
    source="`factor` read as a scale of positions",
)
def rope_multiplies_by_the_factor() -> Iterator[None]:
    def wrong(frequencies):
        return lambda self, device: frequencies(self, device) * self.config.factor**2

    with replaced(f"{ROTARY}:LinearRope.frequencies", wrong):
        yield


@mutant(
    "rope-bands-swapped",
    "position",
    "llama3",
    "short wavelengths are divided and long ones kept",
    source="the comparisons of wavelengths and frequencies mixed up",
)
def rope_bands_swapped() -> Iterator[None]:
    def wrong(frequencies):
        def swapped(self, device):
            kept = 1.0 / self.wavelengths(device)
            return kept * (kept / self.config.factor) / frequencies(self, device)

        return swapped

    with replaced(f"{ROTARY}:Llama3Rope.frequencies", wrong):
        yield


@mutant(
    "rope-of-its-own-original-context",
    "position",
    "llama3",
    "the original context is 8192, whatever the config says",
    source="constants of Meta's released code, in ports of other models",
)
def rope_of_its_own_original_context() -> Iterator[None]:
    def wrong(init):
        def own(self, config, site):
            init(self, attrs.evolve(config, original_max_position_embeddings=8192), site)

        return own

    with replaced(f"{ROTARY}:Llama3Rope.__init__", wrong):
        yield


@mutant(
    "rope-ramp-reversed",
    "position",
    "yarn",
    "quick dimensions are interpolated and slow ones kept",
    source="the mask of YaRN's ramp inverted: 1 - ramp applied on the other side",
)
def rope_ramp_reversed() -> Iterator[None]:
    def wrong(frequencies):
        def reversed_(self, device):
            kept = 1.0 / self.wavelengths(device)
            return kept + kept / self.config.factor - frequencies(self, device)

        return reversed_

    with replaced(f"{ROTARY}:YarnRope.frequencies", wrong):
        yield


@mutant(
    "rope-ramp-always-truncated",
    "position",
    "yarn",
    "the ramp's bounds are rounded although `truncate` is off",
    source="gpt-oss: `truncate: false` unread by ports",
)
def rope_ramp_always_truncated() -> Iterator[None]:
    def wrong(init):
        def own(self, config, site):
            init(self, attrs.evolve(config, truncate=True), site)

        return own

    with replaced(f"{ROTARY}:YarnRope.__init__", wrong):
        yield


@mutant(
    "rope-amplitude-squared",
    "position",
    "yarn",
    "cos and sin are scaled twice",
    source="pitfalls 4.2: scale in the tables and again where they are applied; MLM#1429",
)
def rope_amplitude_squared() -> Iterator[None]:
    with replaced(f"{ROTARY}:amplitude", lambda right: lambda config: right(config) ** 2):
        yield


@mutant(
    "rope-amplitude-of-one-mscale",
    "position",
    "yarn",
    "the tables are scaled by mscale, not by its ratio to mscale_all_dim",
    source="pitfalls 4.2: HF PR47435, DeepSeek-V2's attention factor",
)
def rope_amplitude_of_one_mscale() -> Iterator[None]:
    def wrong(right):
        def one(config):
            return right(config if config.mscale is None else attrs.evolve(config, mscale_all_dim=1e-9))

        return one

    with replaced(f"{ROTARY}:amplitude", wrong):
        yield


@mutant(
    "rope-scores-not-scaled",
    "position",
    "yarn",
    "scores are multiplied by m, not by its square",
    source="pitfalls 4.2: softmax scale times mscale^2; onnxruntime/mobius PR548",
)
def rope_scores_not_scaled() -> Iterator[None]:
    def wrong(right):
        return property(lambda self: right.fget(self) ** 0.5)

    with replaced(f"{POSITIONS}:YarnRope.score_scale", wrong):
        yield


@mutant(
    "none-turns-all-the-same",
    "position",
    "none",
    "layers without positions are rotated as the others",
    source="NoPE layers unread: SmolLM3 and Llama 4 ports",
)
def none_turns_all_the_same() -> Iterator[None]:
    def tables(self, positions):
        angles = positions[..., None].float()
        return Rotary(angles.cos(), angles.sin())

    def rotate(self, x, rotary, inverse=False):
        cos, sin = (table[:, :, None].to(x.dtype) for table in rotary)
        a, b, rest = x[..., :1], x[..., 1:2], x[..., 2:]
        sin = -sin if inverse else sin
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    with (
        replaced(f"{ROTARY}:NoPosition.forward", lambda _: tables),
        replaced(f"{ROTARY}:NoPosition.rotate", lambda _: rotate),
    ):
        yield
