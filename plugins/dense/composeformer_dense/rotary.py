"""Rotary positions: pairs of features turn by an angle proportional to the token's position.

    (a, b) -> (a cos t - b sin t, b cos t + a sin t),    t = position * frequency_i

Source: arXiv 2104.09864, equation 34. The kinds differ in their frequencies alone: `linear` (arXiv
2306.15595), `llama3` (arXiv 2407.21783 and Meta's released code), `yarn` (arXiv 2309.00071, section 3).

Frequencies are computed in fp32 at every forward, from the config. Nothing is stored, so nothing can be
cast, left uninitialised after a meta build, or rounded; the arithmetic is transformers', operation by
operation, so that tables agree to the last bit.

Shapes: B rows, T tokens, H heads, D features of a head, R half of the rotary width.
"""

from math import ceil, floor, log, pi
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from composeformer.tensors import Rotary
from composeformer_dense.configs import position

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite


class Rope(nn.Module):
    """Plain rotary positions; subclasses change `frequencies` and `amplitude`."""

    key: str
    amplitude = 1.0  # scales the tables

    def __init__(self, config: position.Rope, site: "TensorSite") -> None:
        super().__init__()
        self.config = config
        self.width = config.rotary_width(site.width)
        self.interleaved = config.layout == "interleaved"

    def forward(self, positions: Int[Tensor, "B T"]) -> Rotary:
        """The tables of these positions, in fp32."""
        angles = positions[..., None].float() * self.frequencies(positions.device)
        return Rotary(angles.cos() * self.amplitude, angles.sin() * self.amplitude)

    def frequencies(self, device: torch.device) -> Float[Tensor, " R"]:
        """Radians per position, fp32."""
        return 1.0 / self.wavelengths(device)

    def wavelengths(self, device: torch.device) -> Float[Tensor, " R"]:
        """Positions per radian before any extension, fp32."""
        exponents = torch.arange(0, self.width, 2, device=device).float() / self.width
        return self.config.theta**exponents

    def rotate(
        self, x: Float[Tensor, "B T H D"], rotary: Rotary, inverse: bool = False
    ) -> Float[Tensor, "B T H D"]:
        """x with its first features turned, computed in fp32 at least; `inverse` undoes it."""
        cos, sin = (table[:, :, None] for table in rotary)
        if inverse:
            cos, sin = cos / self.amplitude**2, -sin / self.amplitude**2
        turned, rest = x[..., : self.width], x[..., self.width :]
        a, b = (turned[..., 0::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, -1)
        pair = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        turned = turned.to(x.dtype)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


class LinearRope(Rope):
    """Position interpolation: all frequencies divided by the factor."""

    config: position.LinearRope

    def frequencies(self, device: torch.device) -> Tensor:
        return super().frequencies(device) / self.config.factor


class Llama3Rope(Rope):
    """Llama 3.1: a frequency is divided, kept, or blended, by how often it turns in the original context."""

    config: position.Llama3Rope

    def frequencies(self, device: torch.device) -> Tensor:
        c, kept = self.config, super().frequencies(device)
        original = c.original_max_position_embeddings
        lengths = 2 * pi / kept
        short, long = lengths < original / c.high_freq_factor, lengths > original / c.low_freq_factor
        blend = (original / lengths - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
        blended = (1 - blend) * kept / c.factor + blend * kept
        return torch.where(long, kept / c.factor, torch.where(short, kept, blended))


class YarnRope(Rope):
    """YaRN: a linear ramp over dimensions from kept to divided frequencies; tables scaled."""

    config: position.YarnRope

    def __init__(self, config: position.YarnRope, site: "TensorSite") -> None:
        super().__init__(config, site)
        self.amplitude = amplitude(config)

    def frequencies(self, device: torch.device) -> Tensor:
        wavelengths = self.wavelengths(device)
        kept, divided = 1.0 / wavelengths, 1.0 / (self.config.factor * wavelengths)
        low, high = self.bounds()
        ramp = ((torch.arange(self.width // 2, device=device).float() - low) / (high - low)).clamp(0, 1)
        share = 1 - ramp
        return divided * (1 - share) + kept * share

    def bounds(self) -> tuple[float, float]:
        """The first and last dimension of the ramp."""
        c = self.config

        def dimension(rotations: float) -> float:
            turns = c.original_max_position_embeddings / (rotations * 2 * pi)
            return self.width * log(turns) / (2 * log(c.theta))

        low, high = dimension(c.beta_fast), dimension(c.beta_slow)
        if c.truncate:
            low, high = floor(low), ceil(high)
        low, high = max(low, 0), min(high, self.width - 1)
        return (low, high + 0.001) if low == high else (low, high)


def amplitude(config: position.YarnRope) -> float:
    """The attention factor, stated or from the factor (arXiv 2309.00071, section 3.4)."""
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.factor, config.mscale) / mscale(config.factor, config.mscale_all_dim)
    return mscale(config.factor, 1.0)


def mscale(factor: float, strength: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * strength * log(factor) + 1.0


class NoPosition(nn.Module):
    """No rotation: empty tables, features unchanged."""

    key: str

    def __init__(self, config: position.NoPosition, site: "TensorSite") -> None:
        super().__init__()

    def forward(self, positions: Int[Tensor, "B T"]) -> Rotary:
        empty = torch.zeros(*positions.shape, 0, device=positions.device)
        return Rotary(empty, empty)

    def rotate(
        self, x: Float[Tensor, "B T H D"], rotary: Rotary, inverse: bool = False
    ) -> Float[Tensor, "B T H D"]:
        return x
