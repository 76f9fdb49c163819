"""Bugs of norms: what is averaged, in which dtype, with which eps."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from museum_kit import mutant, replaced
from torch.nn import functional as F

NORMS = "composeformer_dense.norms"


def normalising(kind: str, forward: Callable[[Any, Any], Any]) -> AbstractContextManager[None]:
    """The norm `kind` with another forward(self, x)."""
    return replaced(f"{NORMS}:{kind}.forward", lambda _: forward)


@mutant(
    "norm-over-the-tokens",
    "norm",
    "rmsnorm",
    "the mean square over all tokens of a row, not over each one's features",
    source="`mean()` without its dimension",
)
def norm_over_the_tokens() -> Iterator[None]:
    def wrong(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean((-2, -1), keepdim=True) + self.eps)
        return (self.weight * normed.to(x.dtype)).to(x.dtype)

    with normalising("RMSNorm", wrong):
        yield


@mutant(
    "norm-in-the-dtype-of-its-input",
    "norm",
    "rmsnorm",
    "squares in float16 overflow beyond 256, and vanish below 2^-12",
    source="norms without an upcast, in many ports to half precision",
)
def norm_in_the_dtype_of_its_input() -> Iterator[None]:
    def wrong(self, x):
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed).to(x.dtype)

    with normalising("RMSNorm", wrong):
        yield


@mutant(
    "norm-of-the-mean-in-half-precision",
    "norm",
    "layernorm",
    "the mean is rounded to the input's dtype before it is taken off: what is left of tokens far from 0 is noise",
    source="layer norms whose reduction is in float32 and whose difference is not",
)
def norm_of_the_mean_in_half_precision() -> Iterator[None]:
    def wrong(self, x):
        centred = (x - x.mean(-1, keepdim=True)).to(torch.promote_types(x.dtype, torch.float32))
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        y = normed * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    with normalising("LayerNorm", wrong):
        yield


@mutant(
    "norm-widens-the-stream",
    "norm",
    "rmsnorm",
    "a float32 weight makes the output float32",
    source="pitfalls 2.20 beside mixed precision: promotion by a parameter",
)
def norm_widens_the_stream() -> Iterator[None]:
    def wrong(forward):
        return lambda self, x: forward(self, x.to(torch.promote_types(x.dtype, self.weight.dtype)))

    with replaced(f"{NORMS}:RMSNorm.forward", wrong):
        yield


@mutant(
    "norm-eps-is-its-own",
    "norm",
    "rmsnorm",
    "eps is a default of the code, whatever the config says",
    source="pitfalls 2.20: HF#44261, TT PR4395",
)
def norm_eps_is_its_own() -> Iterator[None]:
    def wrong(init):
        def own(self, config, site):
            init(self, config, site)
            self.eps = 1e-6

        return own

    with replaced(f"{NORMS}:RMSNorm.__init__", wrong):
        yield


@mutant(
    "norm-adds-eps-to-the-root",
    "norm",
    "rmsnorm",
    "x / (rms + eps)",
    source="eps outside the root, as in early T5 ports",
)
def norm_adds_eps_to_the_root() -> Iterator[None]:
    def wrong(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps)
        return (self.weight * normed.to(x.dtype)).to(x.dtype)

    with normalising("RMSNorm", wrong):
        yield


@mutant(
    "norm-adds-eps-to-the-sum",
    "norm",
    "rmsnorm",
    "x sqrt(W) / sqrt(sum(x^2) + eps): eps is divided by the width",
    source="x / norm(x) * sqrt(W) written with an eps",
)
def norm_adds_eps_to_the_sum() -> Iterator[None]:
    def wrong(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt((wide.square().sum(-1, keepdim=True) + self.eps) / x.shape[-1])
        return (self.weight * normed.to(x.dtype)).to(x.dtype)

    with normalising("RMSNorm", wrong):
        yield


@mutant(
    "norm-divides-by-the-plain-root",
    "norm",
    "rmsnorm",
    "no eps: a token of zeros is NaN",
    source="0 / 0 at padding and at the first step of zero-initialised streams",
)
def norm_divides_by_the_plain_root() -> Iterator[None]:
    def wrong(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide / wide.square().mean(-1, keepdim=True).sqrt()
        return (self.weight * normed.to(x.dtype)).to(x.dtype)

    with normalising("RMSNorm", wrong):
        yield


@mutant(
    "norm-of-the-unbiased-variance",
    "norm",
    "layernorm",
    "the variance is divided by W - 1",
    source="`x.var(-1)` of PyTorch is unbiased; the formula's is not",
)
def norm_of_the_unbiased_variance() -> Iterator[None]:
    def wrong(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / max(1, x.shape[-1] - 1)
        y = centred * torch.rsqrt(variance + self.eps) * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    with normalising("LayerNorm", wrong):
        yield


@mutant(
    "norm-keeps-the-mean",
    "norm",
    "layernorm",
    "a layer norm computed as an RMS norm",
    source="norm kinds mixed up on conversion",
)
def norm_keeps_the_mean() -> Iterator[None]:
    def wrong(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    with normalising("LayerNorm", wrong):
        yield


@mutant(
    "norm-takes-the-mean-off",
    "norm",
    "rmsnorm",
    "an RMS norm computed as a layer norm without a bias",
    source="norm kinds mixed up on conversion",
)
def norm_takes_the_mean_off() -> Iterator[None]:
    with normalising(
        "RMSNorm", lambda self, x: F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), None, self.eps)
    ):
        yield


@mutant(
    "norm-of-what-the-gain-made",
    "norm",
    "rmsnorm",
    "the gain multiplies before the mean square is taken",
    source="a gain folded into the wrong side",
)
def norm_of_what_the_gain_made() -> Iterator[None]:
    def wrong(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) * self.weight
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    with normalising("RMSNorm", wrong):
        yield


@mutant(
    "norm-adds-one-to-the-gain",
    "norm",
    "rmsnorm",
    "weight + 1 multiplies, as in Gemma's checkpoints, where weight should",
    source="norm conventions mixed up on conversion",
)
def norm_adds_one_to_the_gain() -> Iterator[None]:
    def wrong(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return ((1 + self.weight) * normed.to(x.dtype)).to(x.dtype)

    with normalising("RMSNorm", wrong):
        yield


@mutant(
    "norm-rounds-what-it-divides-by",
    "norm",
    "rmsnorm",
    "the mean square of a bfloat16 token is rounded to bfloat16: the whole token is off by half a percent",
    source="norms without an upcast in bfloat16, where nothing overflows",
)
def norm_rounds_what_it_divides_by() -> Iterator[None]:
    def wrong(self, x):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True).to(x.dtype) + self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (self.weight * (wide * scale).to(x.dtype)).to(x.dtype)

    def in_bfloat16(forward):
        return lambda self, x: (wrong if x.dtype == torch.bfloat16 else forward)(self, x)

    with replaced(f"{NORMS}:RMSNorm.forward", in_bfloat16):
        yield
