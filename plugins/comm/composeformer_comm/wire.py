"""Rows as bytes: what collectives carry, since not every backend knows every dtype (gloo knows no FP8).

A parcel is (N, B) bytes, B alike for all rows: features in a wire format, then whatever travels with a row. Wire
formats: as computed; bfloat16; FP8, whose codes and scales a plugin's codec makes (arXiv 2412.19437, section 3.3.3:
one scale for 1 x 128 features of a token). A row's bytes depend on that row alone, so the same rows round alike
whichever rank they go to.

Shapes: N rows, D features, B bytes.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from composeformer import lazy
from composeformer.plugins import current
from composeformer_comm.config import TILES
from composeformer_comm.declared import SCALE_BYTES, TILE


class Wire:
    """One wire format: `activations`, `bf16` or `fp8`. Rounding happens in `encode` alone."""

    def __init__(self, format: str) -> None:
        self.format = format
        self._codec = tiles() if format == "fp8" else None

    def carried(self, computed: torch.dtype) -> torch.dtype:
        """The dtype of the features' bytes, of values computed in another."""
        if self._codec is not None:
            return torch.float8_e4m3fn
        return torch.bfloat16 if self.format == "bf16" else computed

    def encode(self, value: Float[Tensor, "N D"], computed: torch.dtype) -> list[UInt8[Tensor, "N _"]]:
        """Features as bytes, behind them scales where there are any; `computed` is what travels as computed."""
        if self._codec is None:
            return [as_bytes(value.to(self.carried(computed)))]
        codes, scales = self._codec.encode(value)
        return [as_bytes(codes), as_bytes(scales.float())]

    def widths(self, features: int, computed: torch.dtype) -> list[int]:
        """Bytes of a row in each of what `encode` gives."""
        if self._codec is None:
            return [features * self.carried(computed).itemsize]
        return [features, SCALE_BYTES * -(-features // TILE)]

    def decode(
        self, fields: Sequence[UInt8[Tensor, "N _"]], features: int, computed: torch.dtype, dtype: torch.dtype
    ) -> Float[Tensor, "N D"]:
        """What `encode` was given, rounded to the format, in `dtype`."""
        values = of_bytes(fields[0], self.carried(computed))
        if self._codec is None:
            return values.to(dtype)
        value: Tensor = self._codec.decode((values, of_bytes(fields[1], torch.float32)), dtype)
        return value


@cache
def tiles() -> Any:
    """The codec of FP8 rows. Raises UnknownKind where no plugin has it."""
    component = current().registry.get("codec", TILES)
    return lazy.load(component.implementations[0].module)(component.config())


def as_bytes(value: Tensor) -> UInt8[Tensor, "N B"]:
    """The bytes of each row."""
    return _dense(value).view(torch.uint8)


def of_bytes(rows: UInt8[Tensor, "N B"], dtype: torch.dtype) -> Tensor:
    """Rows of `dtype` again. Columns of a wider parcel are copied: only then are they aligned."""
    if rows.storage_offset() % dtype.itemsize:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return _dense(rows).view(dtype)


def _dense(rows: Tensor) -> Tensor:
    """Rows in one piece. One row or none counts as contiguous whatever its strides, which a view of another dtype
    still looks at.
    """
    if rows.stride() == (rows.shape[1], 1):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def pack(fields: Sequence[UInt8[Tensor, "N _"]]) -> UInt8[Tensor, "N B"]:
    """All fields of a row side by side."""
    return fields[0] if len(fields) == 1 else torch.cat(list(fields), dim=1)


def unpack(parcel: UInt8[Tensor, "N B"], widths: Sequence[int]) -> list[UInt8[Tensor, "N _"]]:
    """What `pack` was given."""
    return list(torch.split(parcel, list(widths), dim=1)) if len(widths) > 1 else [parcel]
