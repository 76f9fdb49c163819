"""Bugs of linear maps that a policy makes: the matrix, what is kept, whose rows and biases, which dtypes."""

from collections.abc import Iterator

from museum_kit import mutant, replaced

EMULATE, LINEAR, QUANTISE = (
    "composeformer_fp8.emulate",
    "composeformer_fp8.linear",
    "composeformer_fp8.quantise",
)


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


@mutant(
    "inputs-kept-on-the-module",
    "precision",
    "bf16",
    "what the backward pass needs is kept on the module, where the next call overwrites it",
    source="recomputation and predictors that share a head call a map twice before its gradient",
)
def inputs_kept_on_the_module() -> Iterator[None]:
    def wrong(forward):
        import torch

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, module):
                ctx.module, module.kept = module, (x, weight)
                return (x.to(module.compute) @ weight.to(module.compute).mT).to(module.dtype)

            @staticmethod
            def backward(ctx, gradient):
                x, weight = ctx.module.kept
                gradient = gradient.to(ctx.module.compute)
                rows = x.reshape(-1, x.shape[-1]).to(ctx.module.compute)
                to_weight = gradient.reshape(-1, gradient.shape[-1]).mT @ rows
                return (
                    (gradient @ weight.to(ctx.module.compute)).to(x.dtype),
                    to_weight.to(weight.dtype),
                    None,
                )

        def product(self, x, offsets=None):
            if offsets is not None or self.bias is not None:
                return forward(self, x, offsets)
            return Product.apply(x, self.weight, self)

        return product

    with replaced("composeformer_dense.precision:CastLinear.forward", wrong):
        yield


@mutant(
    "frozen-weight-stops-gradients",
    "precision",
    "fp8-block",
    "codes for the input gradient are kept where the weight trains",
    source="adapters over frozen quantised weights",
)
def frozen_weight_stops_gradients() -> Iterator[None]:
    def wrong(forward):
        def stopped(self, x, offsets=None):
            return forward(self, x if self.weight.requires_grad else x.detach(), offsets)

        return stopped

    with replaced(f"{LINEAR}:Scaled.forward", wrong):
        yield


@mutant(
    "gradients-format-ignored",
    "precision",
    "mxfp8",
    "gradients are in E4M3 whatever the config says",
    source="recipes whose options no product reads",
)
def gradients_format_ignored() -> Iterator[None]:
    def wrong(tiles):
        from composeformer_fp8.numbers import E4M3

        return lambda self, x, form: tiles(self, x, E4M3)

    with replaced(f"{EMULATE}:Emulated._tiles", wrong):
        yield
