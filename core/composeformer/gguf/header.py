"""The part of a GGUF file before its weights: key-value metadata and the list of tensors.

Layout (the GGUF specification in ggml's docs/gguf.md): magic, version, two counts, the key-value pairs, one
record per tensor, padding, data. Little-endian. Every length in it is a claim by whoever wrote the file, so
each is held against the bytes that are left before anything is allocated. The `gguf` package reads the same
layout, but keeps an array per string (seconds for a vocabulary), trusts the lengths, and multiplies sizes in
64 bits.
"""

import os
import struct
from math import prod
from typing import BinaryIO, NoReturn

import attrs

from composeformer.errors import FolderError, one_of, show

# ids of the specification's value types; names are struct's
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

VERSIONS = (2, 3)
MAX_KEYS = 1 << 16
MAX_ELEMENTS = 1 << 23  # array elements of all metadata together: thirty times a large vocabulary
MAX_BYTES = 1 << 29  # of the header as a whole: a hundred times that of a large vocabulary
MAX_NAME = 1 << 16
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20

# What files that are not GGUF begin with, and what they are.
IMPOSTORS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file it points to; fetch it with `git lfs pull`",
    b"PK\x03\x04": "a zip archive (perhaps a PyTorch checkpoint)",
    b"\x80": "a Python pickle",
    b"<": "a web page (perhaps a failed download)",
    b"{": "a JSON document",
    b"ggml": "an older GGML file; convert it to GGUF",
    b"lmgg": "an older GGML file; convert it to GGUF",
    b"tjgg": "an older GGML file; convert it to GGUF",
    b"FUGG": "a big-endian GGUF file",
}


@attrs.frozen
class TensorInfo:
    """A tensor's place in the file. `shape` is row-major, as torch has it; `offset` counts from byte 0."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int


@attrs.frozen
class Header:
    version: int
    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]


class Cursor:
    """Takes bytes from a file of known size; a claim beyond its end is a FolderError that names the file."""

    def __init__(self, file: BinaryIO, path: str | os.PathLike[str], size: int) -> None:
        self.file = file
        self.path = path
        self.size = size
        self.at = 0
        self.elements_left = MAX_ELEMENTS

    def fail(self, found: str) -> NoReturn:
        raise FolderError(f"{self.path}: {found}")

    def claim(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.size - self.at:
            self.fail(
                f"{what} needs {num_bytes} bytes at byte {self.at}, the file has {self.size}: cut or damaged"
            )

    def take(self, num_bytes: int, what: str) -> bytes:
        self.claim(num_bytes, what)
        if self.at + num_bytes > MAX_BYTES:
            self.fail(f"{what} takes the header beyond {MAX_BYTES} bytes: damaged")
        data = self.file.read(num_bytes)
        if len(data) != num_bytes:
            self.fail(f"{what} ends early: the file was cut while it was read")
        self.at += num_bytes
        return data

    def unpack(self, code: str, what: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.unpack("Q", what)
        if limit is not None and length > limit:
            self.fail(f"{what} is {length} bytes long, at most {limit} are allowed: damaged")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as problem:
            self.fail(f"{what} is not UTF-8 ({problem.reason} at its byte {problem.start}): damaged")

    def value(self, kind: int, what: str) -> object:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            self.fail(
                f"{what} has the unknown value type {kind}: damaged, or newer than version {VERSIONS[-1]}"
            )
        return self.unpack(SCALARS[kind], what)

    def array(self, what: str) -> list[object]:
        kind, count = self.unpack("I", what), self.unpack("Q", what)
        if kind != STRING and kind not in SCALARS:
            self.fail(
                f"{what} is an array of the value type {kind}, allowed are strings, numbers and booleans"
            )
        # A string costs at least its length field.
        size = 8 if kind == STRING else struct.calcsize("<" + SCALARS[kind])
        self.claim(count * size, f"{what} with {count} elements")
        self.elements_left -= count
        if self.elements_left < 0:
            self.fail(f"{what} has {count} elements, all metadata together may have {MAX_ELEMENTS}: damaged")
        if kind == STRING:
            return [self.string(what) for _ in range(count)]
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * size, what)))


def read_header(file: BinaryIO, path: str | os.PathLike[str], size: int) -> Header:
    """The header of an open file of `size` bytes. Raises FolderError for anything that is not sound GGUF."""
    cursor = Cursor(file, path, size)
    _check_magic(cursor)
    version = cursor.unpack("I", "version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        cause = "a big-endian file" if swapped in VERSIONS else "too old, too new or damaged"
        cursor.fail(f"GGUF version {version}, allowed are {one_of(map(str, VERSIONS))}: {cause}")
    num_tensors, num_keys = cursor.unpack("Q", "tensor count"), cursor.unpack("Q", "key count")
    if num_keys > MAX_KEYS:
        cursor.fail(f"{num_keys} metadata keys, at most {MAX_KEYS} are allowed: damaged")
    # The smallest record: an empty name's length, a dimension count, a type, an offset.
    cursor.claim(num_tensors * 24 + num_keys * 13, f"a list of {num_keys} keys and {num_tensors} tensors")

    metadata: dict[str, object] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key", MAX_NAME)
        if key in metadata:
            cursor.fail(f"the metadata key {show(key)} is there twice: damaged")
        metadata[key] = cursor.value(cursor.unpack("I", show(key)), show(key))
    records = [_record(cursor) for _ in range(num_tensors)]
    alignment = _alignment(cursor, metadata)
    start = -(-cursor.at // alignment) * alignment
    return Header(version, metadata, _place(cursor, records, start))


def _check_magic(cursor: Cursor) -> None:
    if cursor.size == 0:
        cursor.fail("the file is empty")
    head = cursor.take(min(cursor.size, 32), "magic")
    if not head.startswith(b"GGUF"):
        for begin, meaning in IMPOSTORS.items():
            if head.startswith(begin):
                cursor.fail(f"not a GGUF file but {meaning}")
        if head[8:9] == b"{":
            cursor.fail("not a GGUF file but safetensors; import the folder that holds it")
        cursor.fail(f"not a GGUF file: it begins with {head[:4]!r} instead of b'GGUF'")
    cursor.file.seek(4)
    cursor.at = 4


def _alignment(cursor: Cursor, metadata: dict[str, object]) -> int:
    alignment = metadata.get("general.alignment", 32)
    sound = type(alignment) is int and 0 < alignment <= MAX_ALIGNMENT and alignment & (alignment - 1) == 0
    if not isinstance(alignment, int) or not sound:
        cursor.fail(f"general.alignment = {show(alignment)}: must be a power of two up to {MAX_ALIGNMENT}")
    return alignment


def _record(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (row-major), type id and offset into the data of the next tensor."""
    name = cursor.string("a tensor name", MAX_NAME)
    what = f"tensor {show(name)}"
    num_dimensions = cursor.unpack("I", what)
    if num_dimensions > MAX_DIMENSIONS:
        cursor.fail(f"{what} has {num_dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed: damaged")
    shape = tuple(cursor.unpack("Q", what) for _ in range(num_dimensions))[::-1]
    return name, shape, cursor.unpack("I", what), cursor.unpack("Q", what)


def _place(
    cursor: Cursor, records: list[tuple[str, tuple[int, ...], int, int]], start: int
) -> dict[str, TensorInfo]:
    """Where each tensor's bytes lie: checked to be whole blocks, inside the file, apart from each other."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    names = {int(kind): kind for kind in GGMLQuantizationType}
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in records:
        what = f"tensor {show(name)}"
        if name in tensors:
            cursor.fail(f"{what} is there twice: damaged")
        if kind not in names:
            cursor.fail(
                f"{what} has the unknown type {kind}: damaged, or newer than the installed gguf package"
            )
        per_block, block_bytes = GGML_QUANT_SIZES[names[kind]]
        if 0 in shape or (shape[-1] if shape else 1) % per_block:
            needs = f"{names[kind].name} needs rows of whole blocks of {per_block}"
            cursor.fail(f"{what} has shape {list(shape)}, {needs}: damaged")
        num_bytes = prod(shape) // per_block * block_bytes
        end = start + offset + num_bytes
        if end > cursor.size:
            cursor.fail(f"{what} ends at byte {end}, the file has {cursor.size}: cut or damaged")
        tensors[name] = TensorInfo(name, shape, names[kind].name, start + offset, num_bytes)
    end, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            cursor.fail(f"tensors {show(before)} and {show(tensor.name)} overlap: damaged")
        end, before = tensor.offset + tensor.num_bytes, tensor.name
    return tensors
