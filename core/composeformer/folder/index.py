"""Which file of a folder holds which tensor, with every name and file checked before it is believed.

A folder is `model.safetensors`, or shards and `model.safetensors.index.json` whose `weight_map` maps tensor
to file. The map is untrusted: its values must name files of the folder, and map and shards must agree
exactly.
"""

import os
from pathlib import Path
from typing import Any

from composeformer.errors import FolderError
from composeformer.folder import strict_json
from composeformer.folder.header import Entry, read_header
from composeformer.folder.paths import INDEX, PICKLED, SUFFIX, WEIGHTS, inside, reason_of


def locate(folder: Path) -> dict[Path, dict[str, Entry]]:
    """The weight files of `folder` with the tensors each holds. Opens safetensors files and the index only.

    Raises FolderError: one line for each thing that index and files disagree on.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise FolderError(f"{folder}: can not be opened: {reason_of(error)}") from error
    if INDEX not in names:
        if WEIGHTS not in names:
            raise FolderError(_nothing_to_read(folder, names))
        path = inside(folder, WEIGHTS)
        return {path: read_header(path)}
    weight_map = _weight_map(inside(folder, INDEX))
    if WEIGHTS in names and WEIGHTS not in weight_map.values():
        raise FolderError(
            f"{folder}: holds {WEIGHTS} and a {INDEX} that does not name it: remove the one that is old"
        )
    return _agree(folder, weight_map)


def _weight_map(path: Path) -> dict[str, str]:
    found: Any = strict_json.read(path)[0]
    mapped = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(mapped, dict) or not all(isinstance(file, str) for file in mapped.values()):
        raise FolderError(f"{path}: needs a table weight_map of tensor names to file names")
    return mapped


def _agree(folder: Path, weight_map: dict[str, str]) -> dict[Path, dict[str, Entry]]:
    """Reads every shard's header once; the map and the headers must say the same."""
    index = folder / INDEX
    shards: dict[Path, dict[str, Entry]] = {}
    files: dict[str, str] = {}
    problems: list[str] = []
    for file in sorted(set(weight_map.values())):
        if not file.endswith(SUFFIX):
            raise FolderError(f"{index}: weight_map: {file!a} is not a {SUFFIX} file; no other is opened")
        path = inside(folder, file, source=f"{index}: weight_map")
        shards[path] = read_header(path)
        for name in shards[path]:
            if name in files:
                problems.append(f"{folder}: tensor {name!a} is in two files, {files[name]} and {file}")
            elif name not in weight_map:
                problems.append(f"{path}: holds tensor {name!a}, which {INDEX} does not list")
            files.setdefault(name, file)
    for name, file in weight_map.items():
        if name not in files:
            problems.append(f"{folder / file}: lacks tensor {name!a}, which {INDEX} puts there")
        elif name not in shards[folder / file]:
            problems.append(f"{folder / file}: lacks tensor {name!a}, which is in {files[name]} instead")
    if problems:
        raise FolderError(*_cut(problems))
    return shards


def _cut(problems: list[str], limit: int = 50) -> list[str]:
    if len(problems) <= limit:
        return problems
    return [*problems[:limit], f"... and {len(problems) - limit:,} more like these"]


def _nothing_to_read(folder: Path, names: list[str]) -> str:
    others = [name for name in names if name.endswith(SUFFIX)]
    if others:
        return f"{folder}: holds {others[0]} but neither {WEIGHTS} nor {INDEX}, one of which is needed"
    pickled = [name for name in names if name.lower().endswith(PICKLED)]
    if pickled:
        return (
            f"{folder}: the only weights are pickled ({pickled[0]}), and reading a pickle runs what it says:"
            f" convert them to {SUFFIX} where you trust them"
        )
    return f"{folder}: holds no weights, neither {WEIGHTS} nor {INDEX}"
