"""Laws that positions claim of their frequencies: closed forms in float64 of the fields they declare.

Unextended, pair r of R turns by theta^(-r / R) a position (arXiv 2104.09864). A longer context divides that by
`factor`: everywhere (`interpolated`, arXiv 2306.15595), or where a pair turns seldom in the original context, by its
wavelength (`by-wavelength`, arXiv 2407.21783) or by its number (`by-parts`, arXiv 2309.00071, section 3.2). The tables
are scaled by `amplitude` (its section 3.4).

Shapes: R pairs that turn.
"""

from collections.abc import Callable
from math import ceil, floor, log, pi
from typing import Any

import torch
from torch import Tensor

from composeformer.assemble import build
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.position import TRIGONOMETRY, gap_of, positions, radius
from composeformer.testing.laws.rotary import frequency_error, turns
from composeformer.testing.variants import variant

STEP = 2.0**-20


def unextended(case: Case) -> Tensor:
    """theta^(-r / R) for each pair (R), in float64."""
    pairs = case.part(torch.tensor([[0]])).cos.shape[-1]
    exponents = -torch.arange(pairs, dtype=torch.float64) / pairs
    found: Tensor = case.config.theta**exponents
    return found


def check(case: Case, part: Any, extend: Callable[[Tensor], Tensor], told: str) -> None:
    """A part's angles against positions times the closed form `extend` of the unextended frequencies."""
    base = unextended(case)
    wanted = extend(base)
    # A kink has two slopes: what one side magnifies, the other may not.
    sides = [(extend(base * (1 + step)) - wanted).abs() / (STEP * wanted) for step in (STEP, -STEP)]
    at = positions(case)
    c = turns(part(at))
    angles = at[..., None].double() * wanted
    error = (c / c.abs() - torch.polar(torch.ones_like(angles), angles)).abs().flatten()
    relative = frequency_error(case.config.theta, torch.maximum(*sides))
    bound = (angles * relative + 2 * TRIGONOMETRY).flatten()
    worst = int((error / bound).argmax())
    case.within(float(error[worst]), float(bound[worst]), told)


@law(
    "position",
    "geometric",
    "unextended, with a factor of 1 if it has one, pair r of R turns by theta^(-r / R) a position",
    kills="rope-theta-is-its-own",
    claimed=True,
    examples=10,
)
def geometric(case: Case) -> None:
    part = case.part
    if getattr(case.config, "factor", 1.0) != 1.0:
        part = case.part_of(build(variant(case, factor=1.0), seed=0))
    check(case, part, lambda base: base, "angles of unextended frequencies")


@law(
    "position",
    "interpolated",
    "every frequency is divided by the factor",
    kills="rope-multiplies-by-the-factor",
    claimed=True,
    examples=10,
)
def interpolated(case: Case) -> None:
    check(case, case.part, lambda base: base / case.config.factor, "angles of divided frequencies")


@law(
    "position",
    "by-wavelength",
    "long wavelengths are divided by the factor, short ones kept, those between blended by how often they turn",
    kills="rope-bands-swapped",
    claimed=True,
    examples=15,
)
def by_wavelength(case: Case) -> None:
    config = case.config
    low, high = config.low_freq_factor, config.high_freq_factor

    def extend(base: Tensor) -> Tensor:
        turned = config.original_max_position_embeddings * base / (2 * pi)
        kept = ((turned - low) / (high - low)).clamp(0, 1)
        blended: Tensor = base * (kept + (1 - kept) / config.factor)
        return blended

    check(case, case.part, extend, "angles of blended frequencies")


@law(
    "position",
    "by-parts",
    "pairs that turn beta_fast times in the original context are kept, beta_slow times divided, a ramp between",
    kills="rope-ramp-reversed",
    claimed=True,
    examples=30,
)
def by_parts(case: Case) -> None:
    config = case.config

    def extend(base: Tensor) -> Tensor:
        width = 2 * len(base)

        def dimension(rotations: float) -> float:
            """The pair that turns that often in the original context."""
            turned = config.original_max_position_embeddings / (rotations * 2 * pi)
            return width * log(turned) / (2 * log(config.theta))

        low, high = dimension(config.beta_fast), dimension(config.beta_slow)
        if config.truncate:
            low, high = floor(low), ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = (torch.arange(len(base), dtype=torch.float64) - low) / ((high - low) or 0.001)
        divided = ramp.clamp(0, 1)
        mixed: Tensor = base * (1 - divided + divided / config.factor)
        return mixed

    check(case, case.part, extend, "angles of frequencies by parts")


@law(
    "position",
    "amplitude",
    "tables lie on a circle of radius 1, or of the attention factor, stated or from the factor and mscale",
    kills="rope-amplitude-squared",
    claimed=True,
    examples=20,
)
def amplitude(case: Case) -> None:
    config = case.config

    def strength(scale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * scale * log(config.factor) + 1

    wanted = 1.0
    if hasattr(config, "mscale"):
        both = config.mscale and config.mscale_all_dim
        stated = strength(config.mscale) / strength(config.mscale_all_dim) if both else strength(1.0)
        wanted = config.attention_factor or stated
    if hasattr(config, "score_scale"):
        scale = strength(config.mscale_all_dim) ** 2 if config.mscale_all_dim else 1.0
        case.within(abs(config.score_scale - scale), 2.0**-50 * scale, "what scores are multiplied by")
    found = radius(case.part(positions(case)))
    told = f"the radius of the tables, which must be {wanted:.6g}"
    case.within(gap_of(found, torch.full_like(found, wanted)), 2 * TRIGONOMETRY * wanted, told)
