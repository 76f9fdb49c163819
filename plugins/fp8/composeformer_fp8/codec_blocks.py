"""`f8-128x128`: matrices as E4M3 codes and fp32 scales of 128x128 blocks, as DeepSeek-V3 was released.

    w ~ q s        q a code, s the `weight_scale_inv` of its block: it multiplies

A weight decodes to the product in fp32, rounded once more where the dtype asked for is narrower. Encoding is
`quantise`: NaN and infinities become NaN codes, a block of zeros has scale 1. Scales that are read are kept, never
recomputed, and must be what an encoder could have written: finite and positive.

Shapes: O outputs, I inputs; r = ceil(O / 128), c = ceil(I / 128); leading dimensions are matrices of their own.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from composeformer_fp8.configs.codec_blocks import BLOCK, Blocks
from composeformer_fp8.numbers import E4M3
from composeformer_fp8.quantise import dequantise, quantise

# Elements that are decoded at a time, so that fp32 values of a whole matrix are never held.
SLAB = 2**17


class BlocksCodec:
    """Matrices to codes and scales, and back."""

    def __init__(self, config: Blocks) -> None:
        self.config = config

    def encode(self, value: Float[Tensor, "*E O I"]) -> tuple[Float[Tensor, "*E O I"], Float[Tensor, "*E r c"]]:
        """Codes and scales."""
        return quantise(value, (BLOCK, BLOCK), E4M3, "float32")

    def decode(
        self,
        parts: Sequence[Tensor],
        dtype: torch.dtype = torch.float32,
        rows: slice | None = None,
    ) -> Float[Tensor, "*E O I"]:
        """q s in fp32 (fp64 in fp64), then in `dtype`; of some `rows` alone where these are given.

        Scales may be of any dtype that fp32 holds.
        """
        codes, scales = parts
        start, stop, step = (rows or slice(None)).indices(codes.shape[-2])
        if step != 1:
            raise ValueError(f"rows with a step of {step}")
        out = codes.new_empty((*codes.shape[:-2], max(stop - start, 0), codes.shape[-1]), dtype=dtype)
        flat = [each.flatten(0, -3) if each.ndim > 2 else each[None] for each in (codes, scales, out)]
        for code, scale, value in zip(*flat, strict=True):
            _decode(code, scale, value, start, stop)
        return out

    def wrong(self, place: int, part: Tensor) -> str | None:
        """What no encoder writes: scales that are not finite and positive. `place` is that in `stored`."""
        if place == 0 or not part.numel():
            return None
        values = part.float()
        bad = ~(values.isfinite() & (values > 0))
        if not bool(bad.any()):
            return None
        index = tuple(int(i) for i in bad.nonzero()[0])
        return f"a scale of {float(values[index])} at {index}, which must be finite and positive"


def _decode(
    codes: Float[Tensor, "O I"], scales: Float[Tensor, "r c"], out: Float[Tensor, "rows I"], start: int, stop: int
) -> None:
    """Rows [start, stop) of a matrix into `out`: whole blocks at a time, the first perhaps entered in its middle."""
    wide = torch.promote_types(out.dtype, torch.float32)
    slab = BLOCK * max(1, SLAB // (BLOCK * max(1, codes.shape[1])))
    for first in range(start // BLOCK * BLOCK, stop, slab):
        low, high = max(first, start), min(first + slab, stop)
        held = scales[first // BLOCK : -(-high // BLOCK)].to(wide)
        value = dequantise(codes[first:high], held, (BLOCK, BLOCK), wide)
        out[low - start : high - start] = value[low - first :]
