"""`quantise` as one Triton kernel: scales of blocks, and codes, in one pass over the tensor.

A program reads a few rows of one block across, or a whole block, and keeps it in registers between the maximum and
the division. The division is the correctly rounded one, so that codes and scales are those of `quantise.quantise`,
bit for bit; the cast to 8 bits is the device's, to nearest, ties to even.

Strides make a transposed tensor no special case. Shapes: E tensors, R rows, C columns.
"""

from math import frexp, prod
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from composeformer.tensors import DTYPES
from composeformer_fp8.numbers import SMALLEST_SCALE, Narrow, blocks
from composeformer_fp8.quantise import EXPONENT, Block

# Rows that a program takes where each has scales of its own.
ROWS = 16


@triton.jit  # type: ignore[untyped-decorator]
def quantise_kernel(
    x_pointer: Any,
    codes_pointer: Any,
    scales_pointer: Any,
    rows: Any,
    columns: Any,
    x_stride_E: Any,
    x_stride_R: Any,
    x_stride_C: Any,
    codes_stride_E: Any,
    codes_stride_R: Any,
    scales_stride_E: Any,
    scales_stride_R: Any,
    largest: tl.constexpr,
    half_step: tl.constexpr,
    smallest: tl.constexpr,
    power: tl.constexpr,
    carry: tl.constexpr,
    exponent: tl.constexpr,
    down: tl.constexpr,
    across: tl.constexpr,
    shared: tl.constexpr,
) -> None:
    """A program's rows of one block: codes (or ratios, where codes are fp32) and scales.

    `power` 0 means scales of any size; else it shifts a magnitude to its scale's power of two, which `carry` rounds up.
    """
    group = tl.program_id(2).to(tl.int64)
    row_R = tl.program_id(0) * down + tl.arange(0, down)
    column_C = tl.program_id(1) * across + tl.arange(0, across)
    inside = (row_R < rows)[:, None] & (column_C < columns)[None, :]
    place = row_R.to(tl.int64)[:, None] * x_stride_R + column_C.to(tl.int64)[None, :] * x_stride_C
    x = tl.load(x_pointer + group * x_stride_E + place, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(x) < float("inf")
    amax = tl.max(tl.where(finite, tl.abs(x), 0.0), axis=1)
    if shared:
        amax = tl.max(amax, axis=0) + tl.zeros_like(amax)
    if power == 0.0:
        scale = tl.div_rn(amax, tl.full(amax.shape, largest, tl.float32))
    else:
        bits = (amax * power).to(tl.int32, bitcast=True) + carry
        scale = (bits & exponent).to(tl.float32, bitcast=True)
    scale = tl.maximum(scale, smallest)
    scale = tl.where(amax <= scale * half_step, 1.0, scale)
    ratio = tl.div_rn(x, scale[:, None] + tl.zeros_like(x))
    ratio = tl.minimum(tl.maximum(ratio, -largest), largest)
    ratio = tl.where(finite, ratio, float("nan"))
    place = row_R.to(tl.int64)[:, None] * codes_stride_R + column_C[None, :]
    codes = ratio.to(codes_pointer.dtype.element_ty)
    tl.store(codes_pointer + group * codes_stride_E + place, codes, mask=inside)
    if shared:
        own, counted = row_R // down, row_R % down == 0
    else:
        own, counted = row_R, row_R < rows
    place = own.to(tl.int64) * scales_stride_R + tl.program_id(1)
    tl.store(scales_pointer + group * scales_stride_E + place, scale, mask=counted)


def quantise(
    x: Float[Tensor, "*E R C"], block: Block, form: Narrow, rule: str, ratios: bool = False
) -> tuple[Float[Tensor, "*E R C"], Float[Tensor, "*E r c"]]:
    """`quantise.quantise` of fp32, bfloat16 or fp16 by the kernel, for blocks of one row or square ones.

    Block sides are powers of two, a side of 1 counted. `ratios` leaves the quotients in fp32, before their cast.
    """
    *leading, rows, columns = x.shape
    r, c = block
    x_ERC = x.reshape(prod(leading), rows, columns)
    codes = torch.empty(x_ERC.shape, dtype=torch.float32 if ratios else DTYPES[form.dtype], device=x.device)
    scales = torch.empty(
        len(x_ERC), blocks(rows, r), blocks(columns, c), dtype=torch.float32, device=x.device
    )
    fraction, exponent = frexp(form.halfway)
    down = ROWS if r == 1 else r
    grid = (blocks(rows, down), blocks(columns, c), len(x_ERC))
    if x.numel():
        quantise_kernel[grid](
            x_ERC,
            codes,
            scales,
            rows,
            columns,
            *x_ERC.stride(),
            *codes.stride()[:2],
            *scales.stride()[:2],
            largest=form.largest,
            half_step=form.step / 2,
            smallest=SMALLEST_SCALE,
            power=0.0 if rule == "float32" else 2.0 ** (1 - exponent),
            carry=0 if rule == "mx" else 2**23 - 1 - int((2 * fraction - 1) * 2**23),
            exponent=EXPONENT,
            down=down,
            across=c,
            shared=r != 1,
        )
    return codes.view(x.shape), scales.view(*leading, *scales.shape[1:])
