"""Rounding to a narrow format and back on a CPU: codes' values times their scales, without the codes.

Casts to and from 8 bits are slow there, so the nearest value is found in fp32 arithmetic: adding and subtracting
1.5 2^(23 - mantissa) times a number's own power of two leaves it with `mantissa` bits, to nearest, ties to even. A
tensor is worked through in strips that stay in the cache.

Shapes: R rows, C columns; within a strip, (blocks down, r, blocks across, c).
"""

from collections.abc import Iterator
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from composeformer_fp8.numbers import Narrow
from composeformer_fp8.quantise import EXPONENT, Block, scale

# Elements of a strip: with a buffer of the same size it stays in a second-level cache.
STRIP = 130_000


def rounded(x: Float[Tensor, "R C"], block: Block, form: Narrow, rule: str) -> Float[Tensor, "R C"]:
    """`dequantise(*quantise(x))` in fp32."""
    found = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    if not x.numel():
        return found
    rows, columns = x.shape
    r, c = block[0] or rows, block[1] or columns
    # What spans strips needs its scale before any of them.
    common = _common(x, form, rule) if r > 1 and r * c > STRIP else None
    unit = 1 if common is not None else r
    for strip, into in zip(_strips(x, unit), _strips(found, unit), strict=True):
        into.copy_(strip)
        for tiles in [into[None, :, None]] if common is not None else _tiles(into, r, c):
            _round(tiles, form, rule, common)
    return found


def _common(x: Tensor, form: Narrow, rule: str) -> Tensor:
    """The scale of a tensor that is one block."""
    found = [_magnitude(strip.to(torch.float32, copy=True)[None, :, None], None) for strip in _strips(x, 1)]
    return scale(torch.stack(found).amax(0), form, rule)


def _strips(x: Tensor, unit: int) -> tuple[Tensor, ...]:
    """Rows in strips of whole blocks."""
    return torch.split(x, max(STRIP // x.shape[1] // unit, 1) * unit)


def _tiles(x: Tensor, r: int, c: int) -> Iterator[Tensor]:
    """(blocks, r, blocks, c): whole blocks, and those cut off at the edges."""
    for rows in _cut(x, 0, r):
        yield from _cut(rows, 2, c)


def _cut(x: Tensor, dim: int, size: int) -> Iterator[Tensor]:
    """A dimension as (blocks, size): the whole blocks, then the rest as one."""
    whole = x.shape[dim] // size * size
    if whole:
        yield torch.unflatten(x.narrow(dim, 0, whole), dim, (-1, size))
    if whole < x.shape[dim]:
        yield x.narrow(dim, whole, x.shape[dim] - whole).unsqueeze(dim)


def _round(x: Tensor, form: Narrow, rule: str, scales: Tensor | None) -> None:
    """In place."""
    buffer = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    if scales is None:
        scales = scale(_magnitude(x, buffer), form, rule)
    x.div_(scales)
    torch.bitwise_and(x.view(torch.int32), EXPONENT, out=buffer.view(torch.int32))
    grid = buffer.clamp_(min=form.normal).mul_(1.5 * 2.0 ** (23 - form.mantissa))
    x.add_(grid).sub_(grid)
    if rule != "float32":
        x.clamp_(-form.largest, form.largest)
    x.mul_(scales)


def _magnitude(x: Tensor, buffer: Tensor | None) -> Tensor:
    """The largest finite magnitude of each block; infinities in `x` become NaN."""
    largest = _per_block(torch.abs(x, out=buffer))
    if isfinite(largest.amax().item()):
        return largest
    x.masked_fill_(x.isinf(), torch.nan)
    return _per_block(x.nan_to_num(nan=0.0).abs())


def _per_block(x: Tensor) -> Tensor:
    for dim in (3, 1):
        if x.shape[dim] != 1:
            x = x.amax(dim, keepdim=True)
    return x
