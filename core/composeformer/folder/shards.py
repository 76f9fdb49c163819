"""Weights to disk in the layout of Hugging Face: one safetensors file, or numbered shards and an index.

Tensors stream in; a shard is written when the next tensor would overfill it, so memory holds one shard and
that tensor. Equal tensors in equal order give equal bytes. That is why the safetensors library does not write
them: it orders metadata at random, and refuses tensors that share memory. It is the judge: what it reads back
is tested.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from composeformer.errors import FolderError
from composeformer.folder.atomic import write_chunks, write_json
from composeformer.folder.dtypes import BY_DTYPE, FORMATS, Format, stored_shape
from composeformer.folder.header import METADATA
from composeformer.folder.paths import INDEX, SUFFIX, WEIGHTS
from composeformer.folder.strict_json import LIMIT

Progress = Callable[[str, int], None]

_ORDER = {name: place for place, name in enumerate(FORMATS)}


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 5 * 2**30,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Writes named tensors into `folder`; the names of the files written, the index last where there is one.

    A yielded tensor must keep its values until its shard is written. It is stored as it is: on any device, of
    any strides, and once per name, also where two names share memory. `metadata` joins `format = "pt"` in
    every header. `progress(name, bytes)` is called after each tensor. Call it within `new_folder`, which
    flushes, and cleans up after a failure. Raises FolderError for a name given twice, a tensor that the
    format can not hold, and a folder that already has weights.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes = {max_shard_bytes}: must be >= 1")
    present = sorted(path.name for path in folder.glob(f"*{SUFFIX}*"))
    if present:
        raise FolderError(f"{folder}: already holds weights ({present[0]})")
    notes = {"format": "pt", **(metadata or {})}
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        shards.append([name for name, _ in shard])
        total += sum(_num_bytes(tensor) for _, tensor in shard)
        # The reference is dropped before the next shard is gathered.
        write_chunks(folder / _partial(len(shards)), _chunks(shard, notes, progress))
        shard.clear()
    count = len(shards)
    if count == 1:
        (folder / _partial(1)).rename(folder / WEIGHTS)
        return [WEIGHTS]
    names = [f"model-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]
    for number, name in enumerate(names, 1):
        (folder / _partial(number)).rename(folder / name)
    places = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
    write_json(
        folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    )
    return [*names, INDEX]


def _partial(number: int) -> str:
    return f"model-{number:05d}{SUFFIX}.partial"


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Groups of tensors in the order given, each within `limit` bytes or a single tensor; at least one."""
    seen: set[str] = set()
    shard: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        _check(name, tensor, seen)
        seen.add(name)
        if shard and size + _num_bytes(tensor) > limit:
            yield shard
            shard, size = [], 0
        shard.append((name, tensor))
        size += _num_bytes(tensor)
    if shard or not seen:
        yield shard


def _chunks(
    shard: list[tuple[str, Tensor]], notes: Mapping[str, str], progress: Progress | None
) -> Iterator[bytes | memoryview]:
    """The bytes of one file: length, header, then each tensor; wide dtypes first, so that all are aligned."""
    shard = sorted(shard, key=lambda item: (-_ORDER[_format(item[1]).name], item[0]))
    header: dict[str, object] = {METADATA: dict(sorted(notes.items()))}
    end = 0
    for name, tensor in shard:
        start, end = end, end + _num_bytes(tensor)
        row = _format(tensor)
        header[name] = {
            "dtype": row.name,
            "shape": stored_shape(tensor.shape, row),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LIMIT:
        raise FolderError(
            f"a shard of {len(shard):,} tensors needs a header over {LIMIT:,} bytes: use smaller shards"
        )
    yield len(text).to_bytes(8, "little")
    yield text
    for name, tensor in shard:
        yield _raw(tensor)
        if progress is not None:
            progress(name, _num_bytes(tensor))


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _format(tensor: Tensor) -> Format:
    return BY_DTYPE[tensor.dtype]


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _check(name: str, tensor: Tensor, seen: set[str]) -> None:
    if name in seen:
        raise FolderError(f"the tensor {name!r} is given twice")
    if name == METADATA:
        raise FolderError(f"a tensor can not be named {METADATA!r}: the format keeps that name for itself")
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise FolderError(f"the tensor name {name!a} is not valid Unicode")
    if tensor.dtype not in BY_DTYPE:
        raise FolderError(f"tensor {name!r}: the format has no dtype for {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        kind = "has no values (meta device)" if tensor.device.type == "meta" else f"is {tensor.layout}"
        raise FolderError(f"tensor {name!r} {kind}: only dense tensors with values can be written")
    if BY_DTYPE[tensor.dtype].packed > 1 and not tensor.ndim:
        raise FolderError(f"tensor {name!r}: a packed dtype needs at least one dimension")
    if sys.byteorder != "little":
        raise FolderError("weights are written in little-endian byte order only, which this machine lacks")
