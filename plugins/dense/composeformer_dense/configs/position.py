"""Rotary positions on paper: `rope`, its extensions to longer contexts, and `none`.

Sources: Su et al., arXiv 2104.09864 (rope); Chen et al., arXiv 2306.15595 (linear); Grattafiori et al.,
arXiv 2407.21783, and Meta's released code (llama3); Peng et al., arXiv 2309.00071 (yarn); Kazemnejad et
al., arXiv 2305.19466 (none).
"""

from collections.abc import Iterable
from math import log

from composeformer.config import Config, config, field
from composeformer.contracts import Cost, Phase, Saved
from composeformer.conventions import interleaved, inverse
from composeformer.errors import Problem
from composeformer.site import Site


@config
class Rope(Config):
    """Pairs of features turn by position * theta^(-2i / width). A site's width is one head's."""

    theta: float = field(default=10000.0, above=1.0, help="Base of the wavelengths.")
    layout: str = field(
        default="half-split",
        choices=("half-split", "interleaved"),
        help="Pairs are (i, i + width/2), as in Hugging Face's Llama, or (2i, 2i + 1), as in the paper.",
    )
    fraction: float = field(
        default=1.0, above=0.0, maximum=1.0, help="Share of each head's features that turn, the first ones."
    )

    def rotary_width(self, width: int) -> int:
        """Features that turn, of a head `width` wide."""
        return int(width * self.fraction)

    def other_layout(self, width: int) -> tuple[str, str, tuple[int, ...]]:
        """This layout, the other one, and the order in which that has the features of a head `width` wide."""
        turning = self.rotary_width(width)
        pairs, rest = interleaved(turning), range(turning, width)
        if self.layout == "interleaved":
            return self.layout, "half-split", (*inverse(pairs), *rest)
        return self.layout, "interleaved", (*pairs, *rest)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        if phase == "train":
            yield Saved(name="nothing")  # tables, which the batch has anyway

    def validate(self, site: Site) -> Iterable[Problem]:
        width = self.rotary_width(site.width)
        if width < 2 or width % 2:
            allowed = f"must give an even rotary width, not {width} (of {site.width} features per head)"
            yield Problem("fraction", self.fraction, allowed)


@config
class LinearRope(Rope):
    """Positions are divided by `factor`."""

    factor: float = field(above=0.0, help="How many times longer the context becomes.")


@config
class Llama3Rope(Rope):
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""

    factor: float = field(above=0.0, help="How many times the long wavelengths are stretched.")
    low_freq_factor: float = field(
        default=1.0, above=0.0, help="Wavelengths above original / low_freq_factor are stretched."
    )
    high_freq_factor: float = field(
        default=4.0, above=0.0, help="Wavelengths below original / high_freq_factor are kept."
    )
    original_max_position_embeddings: int = field(
        minimum=1, unit="tokens", help="Context before the extension."
    )

    def validate(self, site: Site) -> Iterable[Problem]:
        yield from super().validate(site)
        if self.high_freq_factor <= self.low_freq_factor:
            allowed = f"must be > low_freq_factor ({self.low_freq_factor})"
            yield Problem("high_freq_factor", self.high_freq_factor, allowed)


@config
class YarnRope(Rope):
    """Interpolates slow dimensions, keeps fast ones, and scales the tables by an attention factor.

    The factor is `attention_factor` when given; else m(mscale) / m(mscale_all_dim) when both are given, else
    m(1), with m(s) = 0.1 s ln(factor) + 1. A mixer that also scales its scores does that itself.
    """

    factor: float = field(minimum=1.0, help="How many times longer the context becomes.")
    original_max_position_embeddings: int = field(
        minimum=1, unit="tokens", help="Context before the extension."
    )
    beta_fast: float = field(
        default=32.0, above=0.0, unit="rotations", help="Dimensions that turn more often are kept."
    )
    beta_slow: float = field(
        default=1.0, above=0.0, unit="rotations", help="Dimensions that turn less often are interpolated."
    )
    mscale: float | None = field(
        default=None, minimum=0.0, help="Strength of the attention factor's numerator."
    )
    mscale_all_dim: float | None = field(
        default=None, minimum=0.0, help="Strength of the attention factor's denominator."
    )
    attention_factor: float | None = field(
        default=None, above=0.0, help="Scales the tables; absent: from the factor."
    )
    truncate: bool = field(default=True, help="Round the bounds of the blend to whole dimensions.")

    @property
    def score_scale(self) -> float:
        """What a mixer that asks multiplies its scores by: m(mscale_all_dim)^2, 1 without it (arXiv 2412.19437)."""
        if self.factor <= 1.0 or not self.mscale_all_dim:
            return 1.0
        return (0.1 * self.mscale_all_dim * log(self.factor) + 1.0) ** 2

    def validate(self, site: Site) -> Iterable[Problem]:
        yield from super().validate(site)
        if self.beta_fast < self.beta_slow:
            yield Problem("beta_fast", self.beta_fast, f"must be >= beta_slow ({self.beta_slow})")


@config
class NoPosition(Config):
    """Nothing turns; order is known from the causal mask alone."""

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        if phase == "train":
            yield Saved(name="nothing")
