"""What a safetensors file says about itself, checked before the library maps it.

The format: 8 bytes of length N, N bytes of JSON, then the data (github.com/huggingface/safetensors). The
library refuses overlaps, holes and oversize lengths, so these are left to it; it lets pass duplicate keys and
a header that does not start with `{`, and its errors do not tell a Git LFS pointer from a download that
stopped.
"""

import os
from math import prod
from pathlib import Path
from typing import Any

import attrs

from composeformer.errors import FolderError, nearest
from composeformer.folder import strict_json
from composeformer.folder.dtypes import FORMATS, Format, torch_shape
from composeformer.folder.paths import reason_of

METADATA = "__metadata__"
LFS = b"version https://git-lfs"

# torch holds at most 64 dimensions and counts elements in 63 bits.
MAX_DIMS = 64
MAX_BITS = 2**63


@attrs.frozen
class Entry:
    """One tensor of a file: its format and its shape as torch will show it."""

    format: Format
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order of its header.

    Raises FolderError, one line that names the file, for whatever makes the file untrustworthy.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            start += file.read(len(LFS))
            _check_length(path, start, length, size)
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise FolderError(f"{path}: can not be read: {reason_of(error)}") from error
    if not header.startswith(b"{"):
        raise FolderError(
            f"{path}: the header starts with {ascii(header[:1])[1:]}, not with '{{': damaged or crafted"
        )
    found = strict_json.parse(header, f"{path}: the header")
    expected = 8 + length
    entries = {}
    for name, value in found.items():
        if name == METADATA:
            _check_metadata(path, value)
            continue
        entries[name], end = _entry(f"{path}: tensor {_short(name)}", value)
        expected = max(expected, 8 + length + end)
    if expected != size:
        raise FolderError(f"{path}: {sizes(expected, size)}")
    return entries


def sizes(expected: int, actual: int) -> str:
    """How a file's size differs from what it should be, and the usual reason."""
    cause = (
        "an interrupted copy or download"
        if actual < expected
        else "something was appended or it was replaced"
    )
    return f"expected {expected:,} bytes, found {actual:,}: probably {cause}"


def is_pointer(start: bytes) -> bool:
    """Whether a file that starts so is the text that Git LFS leaves in place of a file it did not fetch."""
    return start.startswith(LFS)


POINTER = "a Git LFS pointer, not the file itself: run `git lfs pull`"


def _check_length(path: Path, start: bytes, length: int, size: int) -> None:
    if is_pointer(start):
        raise FolderError(f"{path}: {size:,} bytes, {POINTER}")
    if size < 8:
        raise FolderError(
            f"{path}: {size} bytes, too short for a safetensors file: probably an interrupted download"
        )
    if length > strict_json.LIMIT:
        raise FolderError(
            f"{path}: not a safetensors file of {size:,} bytes: its first 8 bytes announce a header of"
            f" {length:,} (allowed: {strict_json.LIMIT:,}); probably another format or an error page"
        )
    if 8 + length > size:
        raise FolderError(
            f"{path}: expected at least {8 + length:,} bytes (the header alone), found {size:,}:"
            " probably an interrupted copy or download"
        )


def _check_metadata(path: Path, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FolderError(f"{path}: the header's {METADATA} must be a table of texts")


def _entry(where: str, value: Any) -> tuple[Entry, int]:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FolderError(f"{where}: the header must give exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    row = FORMATS.get(dtype) if isinstance(dtype, str) else None
    if row is None:
        hint = nearest(dtype, FORMATS) if isinstance(dtype, str) else None
        raise FolderError(
            f"{where}: unknown dtype {_short(dtype)}" + (f"; did you mean {hint!r}?" if hint else "")
        )
    if row.dtype is None:
        raise FolderError(f"{where}: torch has no dtype for {row.name}")
    if not _sizes_in(shape) or len(shape) > MAX_DIMS:
        raise FolderError(f"{where}: the shape must be at most {MAX_DIMS} sizes >= 0, found {_short(shape)}")
    # Zeros are left out: torch multiplies strides without them.
    if prod(max(size, 1) for size in shape) * row.bits >= MAX_BITS:
        raise FolderError(f"{where}: the shape {_short(shape)} is larger than any tensor can be")
    if not _sizes_in(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FolderError(f"{where}: data_offsets must be two rising positions, found {_short(offsets)}")
    bits = prod(shape) * row.bits
    if bits % 8 or (row.packed > 1 and (not shape or shape[-1] % row.packed)):
        raise FolderError(f"{where}: the shape {_short(shape)} of {row.name} does not fill whole bytes")
    if offsets[1] - offsets[0] != bits // 8:
        raise FolderError(
            f"{where}: {row.name} of shape {_short(shape)} takes {bits // 8:,} bytes,"
            f" data_offsets give {offsets[1] - offsets[0]:,}"
        )
    return Entry(row, torch_shape(shape, row)), offsets[1]


def _sizes_in(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < MAX_BITS for size in value)


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
