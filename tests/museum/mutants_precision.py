"""Bugs of number formats: scales, blocks, groups, accumulators."""

from collections.abc import Iterator

from museum_kit import mutant, replaced

EMULATE, LINEAR, QUANTISE = (
    "composeformer_fp8.emulate",
    "composeformer_fp8.linear",
    "composeformer_fp8.quantise",
)


@mutant(
    "scale-divides",
    "precision",
    "fp8-block",
    "the scale of a released weight divides its codes",
    source="pitfalls 4.8: weight_scale_inv multiplies",
)
def scale_divides() -> Iterator[None]:
    def wrong(held):
        return lambda self, backward=True: (self.weight, 1 / self.weight_scale_inv)

    with replaced(f"{LINEAR}:Coded.held", wrong):
        yield


@mutant(
    "sums-in-bfloat16",
    "precision",
    "fp8-block",
    "gradients of weights are summed in bfloat16",
    source="pitfalls 2.4: what is accumulated in bf16 stops growing",
)
def sums_in_bfloat16() -> Iterator[None]:
    def wrong(to_weight):
        return lambda self, gradient, x, ends: to_weight(self, gradient, x, ends).bfloat16().float()

    with replaced(f"{EMULATE}:Emulated.to_weight", wrong):
        yield


@mutant(
    "accumulator-not-promoted",
    "precision",
    "fp8-block",
    "partial sums stay in the 14 bits of a tensor core",
    source="arXiv 2412.19437, section 3.3.2",
)
def accumulator_not_promoted() -> Iterator[None]:
    def wrong(product):
        import attrs

        return lambda a, b, recipe: product(a, b, attrs.evolve(recipe, promoted=False, bits=14))

    with replaced(f"{EMULATE}:product", wrong):
        yield


@mutant(
    "groups-share-scales",
    "precision",
    "fp8-block",
    "all matrices of a stack have the scales of their common magnitude",
    source="pitfalls 2.21: sglang PR29727, experts mixed",
)
def groups_share_scales() -> Iterator[None]:
    def wrong(quantise):
        def shared(x, block, form, rule):
            if x.ndim < 3:
                return quantise(x, block, form, rule)
            from composeformer.tensors import DTYPES
            from composeformer_fp8.quantise import spread

            _, scales = quantise(x.abs().amax(0), block, form, rule)
            codes = x.float() / spread(scales, block, (x.shape[-2], x.shape[-1]))
            return codes.to(DTYPES[form.dtype]), scales.expand(len(x), *scales.shape)

        return shared

    with replaced(f"{EMULATE}:quantise", wrong):
        yield


@mutant(
    "infinity-spoils-its-block",
    "precision",
    "fp8-tensor",
    "an infinity is the magnitude that its block is scaled by",
    source="pitfalls 2.22: blocks with infinities",
)
def infinity_spoils_its_block() -> Iterator[None]:
    with replaced(f"{QUANTISE}:_finite", lambda finite: lambda x: x):
        yield


@mutant(
    "zero-block-is-nan",
    "precision",
    "fp8-block",
    "a block of zeros is divided by its scale of zero",
    source="pitfalls 2.22: ao 4713, slime PR2256",
)
def zero_block_is_nan() -> Iterator[None]:
    with replaced(f"{QUANTISE}:scale", lambda scale: lambda amax, form, rule: amax / form.largest):
        yield


@mutant(
    "power-of-two-truncated",
    "precision",
    "fp8-block",
    "scales are cut to a power of two, and the largest numbers to what they hold",
    source="pitfalls 2.22: sglang 39193",
)
def power_of_two_truncated() -> Iterator[None]:
    def wrong(power):
        def truncated(amax, form, rule):
            import torch

            whole = amax / form.largest
            return torch.exp2(whole.clamp(min=2.0**-126).log2().floor())

        return truncated

    with replaced(f"{QUANTISE}:_power", wrong):
        yield


@mutant(
    "tiles-down-the-rows",
    "precision",
    "fp8-block",
    "activations share scales with 127 other tokens",
    source="arXiv 2412.19437, section 3.3.2: tiles of activations are 1x128",
)
def tiles_down_the_rows() -> Iterator[None]:
    def wrong(tiles):
        def wider(self, x, form):
            from composeformer_fp8.emulate import Operand, quantise

            block = (self.recipe.tile, self.recipe.tile)
            return Operand(*quantise(x, block, form, self.recipe.scales), block)

        return wider

    with replaced(f"{EMULATE}:Emulated._tiles", wrong):
        yield


@mutant(
    "smallest-scale-too-large",
    "precision",
    "fp8-block",
    "magnitudes are at least 1e-4, which gradients are below",
    source="DeepGEMM's per_token_cast_to_fp8 has clamp(1e-4)",
)
def smallest_scale_too_large() -> Iterator[None]:
    with replaced(f"{QUANTISE}:SMALLEST_SCALE", lambda before: 1e-4 / 448):
        yield


@mutant(
    "half-to-odd",
    "precision",
    "fp8-block",
    "ties round away from zero in one implementation alone",
    source="std::round in kernels, where casts round to even",
    implementation="fast",
)
def half_to_odd() -> Iterator[None]:
    def wrong(rounded):
        def away(x, block, form, rule):
            return rounded(x * (1 + 2.0**-18), block, form, rule) / (1 + 2.0**-18)

        return away

    with replaced("composeformer_fp8.fast:rounded", wrong):
        yield


@mutant(
    "tail-block-cut-evenly",
    "precision",
    "fp8-block",
    "a block's size is the dimension over the number of scales, rounded up",
    source="pitfalls 2.21: ms-swift 6851, compressed-tensors PR547",
)
def tail_block_cut_evenly() -> Iterator[None]:
    def wrong(spread):
        def evenly(scales, block, shape):
            sizes = (-(-length // number) for length, number in zip(shape, scales.shape[-2:], strict=True))
            return spread(scales, tuple(0 if size == 0 else even for size, even in zip(block, sizes)), shape)

        return evenly

    with replaced(f"{EMULATE}:spread", wrong):
        yield


@mutant(
    "scale-with-headroom",
    "precision",
    "fp8-block",
    "scales leave room above the largest number, which grows each time that it is rounded",
    source="margins of scaling recipes",
)
def scale_with_headroom() -> Iterator[None]:
    with replaced(f"{QUANTISE}:scale", lambda scale: lambda amax, form, rule: scale(amax * 1.1, form, rule)):
        yield


@mutant(
    "rounds-towards-zero",
    "precision",
    "fp8-block",
    "casts to eight bits cut off what is below the last one",
    source="conversions by shifts and masks",
)
def rounds_towards_zero() -> Iterator[None]:
    def wrong(quantise):
        def cut(x, block, form, rule):
            import torch

            from composeformer_fp8.quantise import values

            codes, scales = quantise(x, block, form, rule)
            found = quantise(x * (1 - form.roundoff), block, form, rule)[0]
            larger = values(codes).abs() > values(found).abs()
            return torch.where(larger, found.float(), codes.float()).to(codes.dtype), scales

        return cut

    with replaced(f"{EMULATE}:quantise", wrong):
        yield


@mutant(
    "nan-is-a-scale",
    "precision",
    "fp8-block",
    "a block with a NaN has NaN for its scale",
    source="pitfalls 2.22: `amax` keeps NaN",
)
def nan_is_a_scale() -> Iterator[None]:
    def wrong(quantise):
        def spoilt(x, block, form, rule):
            import torch

            from composeformer_fp8.quantise import _cut, values

            codes, scales = quantise(x, block, form, rule)
            odd = _cut(values(codes).isnan().float(), block).amax((-3, -1)) > 0
            return codes, scales.masked_fill(odd, torch.nan)

        return spoilt

    with replaced(f"{EMULATE}:quantise", wrong):
        yield
