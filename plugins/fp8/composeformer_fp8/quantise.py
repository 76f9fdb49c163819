"""Codes and scales of a tensor, as declared: the judge of every kernel.

    s = max(amax / largest, 2^-126)        over the finite elements of a block, in fp32
    q = x / s in fp32, to the nearest code, ties to even, at most `largest`
    x ~ q s

- A block whose codes are all zero has s = 1.
- NaN and infinities become NaN codes, and touch neither the scale nor the codes of their neighbours.
- `ue8m0`: s is the smallest power of two with amax <= `halfway` s (464 for E4M3, which still rounds to 448). Then the
  largest code stays above `halfway` / 2, so that quantising q s gives (q, s) again. With s = 2^ceil(log2(amax / 448)),
  as in DeepGEMM, it does not: for amax / s in (224, 232] the largest code becomes 224, whose scale is s / 2.
- `mx`: s = 2^(floor(log2 amax) - 8), as in OCP Microscaling Formats 1.0, section 6.3; what exceeds `largest` saturates.

Source: arXiv 2412.19437, section 3.3.2; DeepGEMM's `per_block_cast_to_fp8`.

Shapes: R rows, C columns; a block has r rows and c columns (0 for all), the last ones perhaps fewer; leading
dimensions are tensors of their own. There are (ceil(R / r), ceil(C / c)) scales.
"""

from math import frexp

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from composeformer.tensors import DTYPES
from composeformer_fp8.numbers import SMALLEST_SCALE, Narrow, blocks

Block = tuple[int, int]

# The bits of an fp32 number's exponent.
EXPONENT = 0x7F800000


def quantise(
    x: Float[Tensor, "*E R C"], block: Block, form: Narrow, rule: str
) -> tuple[Float[Tensor, "*E R C"], Float[Tensor, "*E r c"]]:
    """Codes in the dtype of `form`, and fp32 scales by `rule`: `float32`, `ue8m0` or `mx`."""
    rows, columns = x.shape[-2:]
    cut = _cut(_finite(x.float()), block)
    scales = scale(cut.nan_to_num(nan=0.0).abs().amax((-3, -1)), form, rule)
    ratio = (cut / scales[..., :, None, :, None]).clamp(-form.largest, form.largest)
    codes = ratio.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
    return codes.to(DTYPES[form.dtype]), scales


def dequantise(
    codes: Float[Tensor, "*E R C"],
    scales: Float[Tensor, "*E r c"],
    block: Block,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*E R C"]:
    """q s, in `dtype`."""
    return values(codes, dtype) * spread(scales, block, (codes.shape[-2], codes.shape[-1])).to(dtype)


def scale(amax: Float[Tensor, "*S"], form: Narrow, rule: str) -> Float[Tensor, "*S"]:
    """The scales of blocks with these largest magnitudes."""
    if rule == "float32":
        found = amax / form.largest
    else:
        found = _power(amax, form, rule)
    found = found.clamp(min=SMALLEST_SCALE)
    # Half of the smallest code rounds to zero, being a tie with an even neighbour.
    return found.masked_fill(amax <= found * (form.step / 2), 1.0)


def _power(amax: Tensor, form: Narrow, rule: str) -> Tensor:
    """The power of two for each magnitude: its own over that of the last binade, or the next where it is too small."""
    fraction, exponent = frexp(form.halfway)
    # Adding this to an fp32 number's bits carries into its exponent if its fraction is above that of `halfway`.
    carry = 0 if rule == "mx" else 2**23 - 1 - int((2 * fraction - 1) * 2**23)
    least = (amax * 2.0 ** (1 - exponent)).view(torch.int32) + carry
    return (least & EXPONENT).view(torch.float32)


def values(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes stand for without their scales. On CPUs a table is several times quicker than the cast."""
    if not codes.is_cpu or codes.dtype.itemsize != 1:
        return codes.to(dtype)
    table = torch.arange(256, dtype=torch.uint8, device="cpu").view(codes.dtype).to(torch.float32)
    index = codes.contiguous().view(torch.uint8).view(-1).int()
    return table.index_select(0, index).view(codes.shape).to(dtype)


def spread(scales: Float[Tensor, "*E r c"], block: Block, shape: tuple[int, int]) -> Float[Tensor, "*E R C"]:
    """Each element's scale, without copies where a dimension has one block."""
    for dim, size, length in zip((-2, -1), block, shape, strict=True):
        if scales.shape[dim] == 1:
            expanded = list(scales.shape)
            expanded[dim] = length
            scales = scales.expand(expanded)
        elif size != 1:
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, length)
    return scales


def _finite(x: Tensor) -> Tensor:
    """Infinities as NaN, which no clamp turns into numbers."""
    return x.masked_fill(x.isinf(), torch.nan)


def _cut(x: Tensor, block: Block) -> Tensor:
    """(..., R, C) as (..., blocks, r, blocks, c), filled up with zeros."""
    rows, columns = x.shape[-2:]
    r, c = block[0] or max(rows, 1), block[1] or max(columns, 1)
    down, across = blocks(rows, r), blocks(columns, c)
    x = F.pad(x, (0, across * c - columns, 0, down * r - rows))
    return x.reshape(*x.shape[:-2], down, r, across, c)
