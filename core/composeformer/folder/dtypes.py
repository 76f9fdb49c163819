"""Every dtype name of the safetensors format, with its size and what torch calls it.

The table is exhaustive, so that a name it lacks is refused as such instead of being misread. Packed formats
count logical elements on disk; torch holds two 4-bit elements in one byte and halves the last dimension.
"""

from collections.abc import Sequence

import attrs
import torch


@attrs.frozen
class Format:
    """A dtype on disk: its name, bits per logical element, and torch's dtype (None: torch has none)."""

    name: str
    bits: int
    dtype: torch.dtype | None

    @property
    def packed(self) -> int:
        """Logical elements in one element of torch."""
        return 1 if self.dtype is None else self.dtype.itemsize * 8 // self.bits


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("BOOL", 8, torch.bool),
        Format("F4", 4, torch.float4_e2m1fn_x2),
        Format("F6_E2M3", 6, None),
        Format("F6_E3M2", 6, None),
        Format("U8", 8, torch.uint8),
        Format("I8", 8, torch.int8),
        Format("F8_E5M2", 8, torch.float8_e5m2),
        Format("F8_E4M3", 8, torch.float8_e4m3fn),
        Format("F8_E8M0", 8, torch.float8_e8m0fnu),
        Format("F8_E4M3FNUZ", 8, torch.float8_e4m3fnuz),
        Format("F8_E5M2FNUZ", 8, torch.float8_e5m2fnuz),
        Format("I16", 16, torch.int16),
        Format("U16", 16, torch.uint16),
        Format("F16", 16, torch.float16),
        Format("BF16", 16, torch.bfloat16),
        Format("I32", 32, torch.int32),
        Format("U32", 32, torch.uint32),
        Format("F32", 32, torch.float32),
        Format("C64", 64, torch.complex64),
        Format("F64", 64, torch.float64),
        Format("I64", 64, torch.int64),
        Format("U64", 64, torch.uint64),
    )
}

BY_DTYPE: dict[torch.dtype, Format] = {row.dtype: row for row in FORMATS.values() if row.dtype is not None}


def stored_shape(shape: Sequence[int], row: Format) -> tuple[int, ...]:
    """A torch shape as the file writes it: the last dimension counts logical elements."""
    return (*shape[:-1], shape[-1] * row.packed) if row.packed > 1 and len(shape) else tuple(shape)


def torch_shape(shape: Sequence[int], row: Format) -> tuple[int, ...]:
    """A shape in a file as torch shows it, the inverse of `stored_shape`."""
    return (*shape[:-1], shape[-1] // row.packed) if row.packed > 1 and len(shape) else tuple(shape)
