"""A GGUF file opened for reading: its metadata, and its tensors dequantised one at a time.

The header is read and checked when the file is opened (see `header`); weights are read when asked for, so
memory holds one tensor. Block formats are decoded by the `gguf` package, which ggml's authors keep beside the
formats.
"""

import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from composeformer.errors import FolderError, MissingExtra, nearest, show
from composeformer.gguf.header import Header, TensorInfo, read_header
from composeformer.lazy import available

FLOATS = ("F32", "F16", "F64")
INTEGERS = ("I8", "I16", "I32", "I64")


class GGUFFile:
    """`metadata` by key, `tensors` by name, and `get(name)` for the numbers. Closes with the `with` block."""

    def __init__(self, path: Path, file: BufferedReader, header: Header) -> None:
        self.path = path
        self.version = header.version
        self.metadata = header.metadata
        self.tensors = header.tensors
        self._file = file

    def names(self) -> Mapping[str, TensorInfo]:
        """What is in the file, by name."""
        return self.tensors

    def get(self, name: str) -> Float[Tensor, "..."]:
        """The tensor as float32, shaped as `tensors[name].shape`: contiguous, writable, the caller's own.

        Raises FolderError for an unknown name, an integer tensor, a block format without a decoder, and a
        file that is closed or was cut since it was opened.
        """
        info = self.tensors.get(name)
        if info is None:
            near = nearest(name, self.tensors)
            hint = f"; did you mean {near!r}?" if near else ""
            raise FolderError(f"{self.path}: there is no tensor {show(name)}{hint}")
        if info.type in INTEGERS:
            raise FolderError(f"{self.path}: tensor {show(name)} holds integers ({info.type}), not weights")
        values = _decode(self._read(info), info, self.path)
        return torch.from_numpy(values.reshape(info.shape))

    def _read(self, info: TensorInfo) -> bytearray:
        data = bytearray(info.num_bytes)
        try:
            self._file.seek(info.offset)
            count = self._file.readinto(data)
        except (OSError, ValueError) as problem:
            raise FolderError(f"{self.path}: tensor {show(info.name)} can not be read: {problem}") from None
        if count != info.num_bytes:
            raise FolderError(f"{self.path}: tensor {show(info.name)} ends early: cut since it was opened")
        return data

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open and check a GGUF file; its weights are not read yet.

    Raises FolderError (missing, not a regular file, not GGUF, truncated, or claims that its size belies) and
    MissingExtra without the gguf package.
    """
    if not available("gguf"):
        raise MissingExtra("gguf", "gguf", "reading a GGUF file")
    path = Path(path)
    try:
        # Opening a pipe would wait for its writer, so ask what it is first.
        if not stat.S_ISREG(path.stat().st_mode):
            raise FolderError(f"{path}: not a regular file" + (" but a folder" if path.is_dir() else ""))
        file = path.open("rb")
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise FolderError(f"{path}: can not be opened: {reason}") from None
    try:
        return GGUFFile(path, file, read_header(file, path, os.fstat(file.fileno()).st_size))
    except BaseException:
        file.close()
        raise


def _decode(
    data: bytearray, info: TensorInfo, path: Path
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if info.type in FLOATS:
        width = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[info.type]
        # float32 stays in `data`, which nobody else holds
        return np.frombuffer(data, width).astype(np.float32, copy=False)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.frombuffer(data, np.uint8).reshape(*info.shape[:-1], -1)
    try:
        with np.errstate(all="ignore"):
            values = dequantize(rows, GGMLQuantizationType[info.type])
    except NotImplementedError:
        raise FolderError(
            f"{path}: tensor {show(info.name)} is stored as {info.type}, which can not be decoded"
        ) from None
    return np.array(values, np.float32, order="C")
