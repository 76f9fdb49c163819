"""`f8-128x128` on paper: E4M3 codes, and one fp32 scale for each block of 128x128 elements of a matrix.

The form of DeepSeek-V3's released weights. A block at the lower or right edge may be smaller, so a dimension of n
has ceil(n / 128) scales: 576 rows have 5.

Source: the released `weight` and `weight_scale_inv`; arXiv 2412.19437, section 3.3.2.
"""

from math import ceil

import attrs

from composeformer.config import Config, config
from composeformer.contracts import Weight
from composeformer.rounding import Operand, scaled

BLOCK = 128


@config
class Blocks(Config):
    """Matrices in blocks that share a scale; each of a stack of matrices has blocks of its own."""

    def stored(self, weight: Weight) -> tuple[Weight, ...]:
        """Codes under the weight's own name, and `<name>_scale_inv`, which multiplies them."""
        *groups, rows, columns = weight.shape
        return (
            attrs.evolve(weight, dtype="float8_e4m3fn", trains=False, init=None),
            Weight(
                name=f"{weight.name}_scale_inv",
                shape=(*groups, ceil(rows / BLOCK), ceil(columns / BLOCK)),
                dtype="float32",
                trains=False,
            ),
        )

    @property
    def rounding(self) -> Operand:
        """How far encoding moves a number."""
        return scaled("float8_e4m3fn", (BLOCK, BLOCK))

    def cut(self, dim: int, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """What holds [start, stop) of dimension -2 or -1: codes from the edge of a block on, and its scales."""
        first = start // BLOCK
        return (first * BLOCK, stop), (first, ceil(stop / BLOCK))
