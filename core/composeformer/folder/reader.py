"""Weights from disk, memory-mapped: a folder is checked when opened, bytes move when asked for."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from composeformer.errors import FolderError, nearest
from composeformer.folder.index import locate
from composeformer.folder.paths import reason_of


@attrs.frozen
class TensorInfo:
    """A tensor on disk: its dtype and shape as torch will show them, and the name of its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str


class WeightReader:
    """The tensors of a model folder, by name.

    Opening reads and checks every header, and maps the files; no weight is read. Raises FolderError if the
    folder or one of its files can not be trusted. Use it as a context manager, or `close` it; tensors already
    handed out stay valid.

    Pages of a mapped file stay in memory once they are read. With `one_file` only the file that was asked for last
    stays mapped (and those of tensors still held), so that going through a folder needs no more memory than that.
    """

    def __init__(self, folder: Path, *, one_file: bool = False) -> None:
        self.folder = Path(folder)
        self.one_file = one_file
        self._closed = False
        self._handles: dict[str, Any] = {}
        found: dict[str, TensorInfo] = {}
        for path, entries in locate(self.folder).items():
            for name, entry in entries.items():
                assert entry.format.dtype is not None, "read_header refuses formats that torch lacks"
                found[name] = TensorInfo(entry.format.dtype, entry.shape, path.name)
            # The library has checks of its own, so each file is opened now.
            handle = _open(path)
            if not one_file:
                self._handles[path.name] = handle
        self._names = MappingProxyType(dict(sorted(found.items())))

    def names(self) -> Mapping[str, TensorInfo]:
        """What the folder holds, sorted by name."""
        return self._names

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """One tensor on `device`. On the CPU its memory is the mapped file: writing to it changes no file.

        Raises FolderError for a name that the folder lacks.
        """
        tensor: Tensor = self._handle(name).get_tensor(name)
        return tensor.to(device)

    def get_slice(self, name: str) -> Any:
        """A view to index like a tensor, which reads only the part asked for. Raises as `get` does."""
        return self._handle(name).get_slice(name)

    def close(self) -> None:
        """Lets the files go. Closing twice is fine."""
        self._closed = True
        self._handles.clear()

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, name: str) -> Any:
        info = self._names.get(name)
        if info is None:
            near = nearest(name, self._names)
            hint = "" if near is None else f"; did you mean {near!r}?"
            raise FolderError(f"{self.folder}: holds no tensor {name!a}{hint}")
        if self._closed:
            raise ValueError(f"{self.folder}: the reader is closed")
        if info.file not in self._handles or (self.one_file and len(self._handles) > 1):
            held = self._handles.get(info.file)
            self._handles = {info.file: _open(self.folder / info.file) if held is None else held}
        return self._handles[info.file]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise FolderError(f"{path}: {reason_of(error)}") from error
