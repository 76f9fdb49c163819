"""Bugs of number formats: scales, blocks, groups, accumulators, what is stale, what is stored."""

from collections.abc import Iterator

from museum_kit import mutant, replaced

EMULATE, LINEAR, QUANTISE = (
    "composeformer_fp8.emulate",
    "composeformer_fp8.linear",
    "composeformer_fp8.quantise",
)
BLOCKS = "composeformer_fp8.codec_blocks"


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
    "matrix-is-the-master",
    "precision",
    "fp8-block",
    "the matrix that absorption multiplies by is the master weight",
    source="reading `.weight` for MLA's absorbed form under FP8",
)
def matrix_is_the_master() -> Iterator[None]:
    with replaced(f"{LINEAR}:Scaled.matrix", lambda matrix: lambda self: self.weight.float()):
        yield


@mutant(
    "master-in-the-matrix",
    "precision",
    "bf16",
    "the matrix that absorption multiplies by is the master weight",
    source="reading `.weight` for MLA's absorbed form under mixed precision",
)
def master_in_the_matrix() -> Iterator[None]:
    def forward(before):
        def narrow(self, x, offsets=None):
            from torch.nn import functional as F

            from composeformer_dense.ragged import ragged

            bias = None if self.bias is None else self.bias.to(self.compute)
            x, weight = x.to(self.compute), self.weight.to(self.compute)
            y = F.linear(x, weight, bias) if offsets is None else ragged(x, weight, bias, offsets)
            return y.to(self.dtype)

        return narrow

    place = "composeformer_dense.precision:CastLinear"
    with (
        replaced(f"{place}.forward", forward),
        replaced(f"{place}.matrix", lambda matrix: lambda self: self.weight),
    ):
        yield


@mutant(
    "matrix-without-a-gradient",
    "precision",
    "fp8-block",
    "the matrix is detached, so that what absorbs it does not train it",
    source="absorbed projections in training",
)
def matrix_without_a_gradient() -> Iterator[None]:
    with replaced(f"{LINEAR}:Scaled.matrix", lambda matrix: lambda self: matrix(self).detach()):
        yield


@mutant(
    "matrix-stale",
    "precision",
    "fp8-block",
    "codes are made once and kept over updates of the weight",
    source="weight caches of FP8 layers that nobody resets",
)
def matrix_stale() -> Iterator[None]:
    def wrong(held):
        def kept(self, backward=True):
            if not hasattr(self, "_codes"):
                self._codes = held(self)
            return self._codes

        return kept

    with replaced(f"{LINEAR}:Scaled.held", wrong):
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
    "output-in-the-inputs-dtype",
    "precision",
    "bf16",
    "a map gives the dtype that came in",
    source="`.to(x.dtype)` at the end of linear layers",
)
def output_in_the_inputs_dtype() -> Iterator[None]:
    def wrong(forward):
        return lambda self, x, offsets=None: forward(self, x, offsets).to(x.dtype)

    with replaced("composeformer_dense.precision:CastLinear.forward", wrong):
        yield


@mutant(
    "noise-in-training",
    "precision",
    "fp8-block",
    "rounding is stochastic, so that recomputation gives other gradients",
    source="stochastic rounding without a state that is restored",
)
def noise_in_training() -> Iterator[None]:
    def wrong(tiles):
        def noisy(self, x, form):
            import torch

            return tiles(self, x.float() * (1 + form.roundoff * (torch.rand(x.shape) - 0.5)), form)

        return noisy

    with replaced(f"{EMULATE}:Emulated._tiles", wrong):
        yield


@mutant(
    "codes-are-cast",
    "precision",
    "int8",
    "a cast of the model casts codes and scales",
    source="HF `model.to(dtype)` and `half()` on quantised models",
)
def codes_are_cast() -> Iterator[None]:
    from torch import nn

    with replaced("composeformer_fp8.kept:Kept._apply", lambda apply: nn.Module._apply):
        yield


@mutant(
    "fixed-dtype-ignored",
    "precision",
    "full",
    "what a part fixes to fp32, a router's bias, is stored in the model's dtype",
    source="pitfalls 2.4: bias in bf16",
)
def fixed_dtype_ignored() -> Iterator[None]:
    def wrong(form):
        import attrs

        return lambda self, role, weight, sensitive: form(
            self, role, attrs.evolve(weight, dtype=None), sensitive
        )

    with replaced("composeformer_dense.configs.precision:Full.format", wrong):
        yield


@mutant(
    "rows-of-nobody-unwritten",
    "precision",
    "bf16",
    "rows past the last group are left as the memory was",
    source="pitfalls 2.14: grouped_mm, PT 154557",
)
def rows_of_nobody_unwritten() -> Iterator[None]:
    def wrong(rows):
        from torch.nn import functional as F

        return lambda x, matrix, ends: F.grouped_mm(x, matrix.mT, offs=ends)

    with replaced("composeformer_dense.ragged:_rows", wrong):
        yield


@mutant(
    "bias-of-the-next-group",
    "precision",
    "fp8-block",
    "the first row of a group has the bias of the one before",
    source="searchsorted without `right`",
)
def bias_of_the_next_group() -> Iterator[None]:
    def wrong(spread):
        def left(bias, offsets, rows):
            import torch
            from torch.nn import functional as F

            if offsets is None:
                return spread(bias, offsets, rows)
            group = torch.searchsorted(offsets, torch.arange(rows))
            return F.pad(bias.float(), (0, 0, 0, 1))[group]

        return left

    with replaced(f"{LINEAR}:_spread", wrong):
        yield


@mutant(
    "input-gradient-of-the-master",
    "precision",
    "bf16",
    "the gradient of the input is taken with another weight than the output",
    source="autograd functions that save the weight before it is cast",
)
def input_gradient_of_the_master() -> Iterator[None]:
    def wrong(forward):
        import torch

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight):
                ctx.save_for_backward(x, weight)
                return (x.bfloat16() @ weight.bfloat16().mT).float()

            @staticmethod
            def backward(ctx, gradient):
                x, weight = ctx.saved_tensors
                flat, rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
                to_x = (gradient @ weight.float()).to(x.dtype)
                return to_x, (flat.bfloat16().mT @ rows.bfloat16()).to(weight.dtype)

        def product(self, x, offsets=None):
            if offsets is not None or self.compute != torch.bfloat16 or self.bias is not None:
                return forward(self, x, offsets)
            return Product.apply(x, self.weight).to(self.dtype)

        return product

    with replaced("composeformer_dense.precision:CastLinear.forward", wrong):
        yield


@mutant(
    "bias-sums-in-bfloat16",
    "precision",
    "bf16",
    "the gradient of a group's bias is summed in bfloat16, row by row, and stops at 256",
    source="pitfalls 2.4: what is accumulated in bf16 stops growing; found here by the law",
)
def bias_sums_in_bfloat16() -> Iterator[None]:
    def wrong(ragged):
        def narrow(x, matrix, bias, ends):
            import torch
            from torch.nn import functional as F

            y = ragged(x, matrix, None, ends)
            if bias is None:
                return y
            group = torch.searchsorted(ends, torch.arange(len(x)), right=True)
            return y + F.pad(bias, (0, 0, 0, 1))[group]

        return narrow

    with replaced("composeformer_dense.precision:ragged", wrong):
        yield
