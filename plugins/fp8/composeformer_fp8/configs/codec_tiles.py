"""`f8-1x128` on paper: E4M3 codes and one fp32 scale for 128 neighbouring features of a row."""

from math import ceil

import attrs

from composeformer.config import Config, config
from composeformer.contracts import Weight
from composeformer.rounding import Operand, scaled

TILE = 128


@config
class Tiles(Config):
    """Rows in tiles of their own, as activations travel (arXiv 2412.19437, section 3.3.3)."""

    def stored(self, weight: Weight) -> tuple[Weight, ...]:
        """Codes under the tensor's own name, and `<name>_scale_inv`, which multiplies them."""
        *rows, features = weight.shape
        return (
            attrs.evolve(weight, dtype="float8_e4m3fn", trains=False, init=None),
            Weight(
                name=f"{weight.name}_scale_inv",
                shape=(*rows, ceil(features / TILE)),
                dtype="float32",
                trains=False,
            ),
        )

    @property
    def rounding(self) -> Operand:
        """How far encoding moves a number."""
        return scaled("float8_e4m3fn", (1, TILE))

    def cut(self, dim: int, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """What holds [start, stop) of dimension -2 or -1: whole rows, or codes from the edge of a tile on."""
        if dim == -2:
            return (start, stop), (start, stop)
        first = start // TILE
        return (first * TILE, stop), (first, ceil(stop / TILE))
