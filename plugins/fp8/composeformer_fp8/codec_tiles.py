"""`f8-1x128`: each row in E4M3 codes with one fp32 scale for 128 features, as activations travel between processes.

Source: arXiv 2412.19437, section 3.3.3. The rounding is that of `quantise`: every row alone, NaN and infinities as
NaN codes, a tile of zeros with scale 1.

Shapes: N rows, D features, S = ceil(D / 128) scales a row.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from composeformer_fp8.configs.codec_tiles import TILE, Tiles
from composeformer_fp8.numbers import E4M3
from composeformer_fp8.quantise import dequantise, quantise

BLOCK = (1, TILE)


class TilesCodec:
    """Rows of features to codes and scales, and back."""

    def __init__(self, config: Tiles) -> None:
        self.config = config

    def encode(self, value: Float[Tensor, "*E N D"]) -> tuple[Float[Tensor, "*E N D"], Float[Tensor, "*E N S"]]:
        """Codes and scales."""
        return quantise(value, BLOCK, E4M3, "float32")

    def decode(
        self,
        parts: tuple[Float[Tensor, "*E N D"], Float[Tensor, "*E N S"]],
        dtype: torch.dtype = torch.float32,
        rows: slice | None = None,
    ) -> Float[Tensor, "*E M D"]:
        """Codes times scales in fp32 (fp64 in fp64), then in `dtype`; of some `rows` alone where these are given."""
        codes, scales = parts if rows is None else (part[..., rows, :] for part in parts)
        wide = torch.promote_types(dtype, torch.float32)
        return dequantise(codes, scales, BLOCK, wide).to(dtype)

    def wrong(self, place: int, part: Tensor) -> str | None:
        """What no encoder writes: scales that are not finite and positive. `place` is that in `stored`."""
        if place == 0 or not part.numel():
            return None
        bad = ~(part.isfinite() & (part > 0))
        if not bool(bad.any()):
            return None
        index = tuple(int(i) for i in bad.nonzero()[0])
        return f"a scale of {float(part[index])} at {index}, which must be finite and positive"
