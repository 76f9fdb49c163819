"""JSON as input: bounded in size, UTF-8, no key twice, and nothing that JSON itself does not allow.

A parser that lets the last of two equal keys win can be made to see another dtype than the tool that checked
the file before (measured: safetensors 0.8.0 does so for tensor names).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from composeformer.errors import FolderError
from composeformer.folder.paths import reason_of

LIMIT = 100_000_000


def parse(data: bytes, where: str) -> Any:
    """The value that `data` spells. Raises FolderError, starting with `where`, for everything else."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FolderError(f"{where}: not UTF-8 text at byte {error.start}") from error
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError as error:
        raise FolderError(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise FolderError(f"{where}: not valid JSON: {reason_of(error)}") from error


def read(path: Path, *, limit: int = LIMIT) -> tuple[Any, bytes]:
    """The value in a file of at most `limit` bytes, and the bytes themselves."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise FolderError(f"{path}: can not be read: {reason_of(error)}") from error
    if len(data) > limit:
        raise FolderError(f"{path}: larger than the {limit:,} bytes allowed for such a file")
    return parse(data, str(path)), data


def dumps(value: object, *, indent: int | None = 2, sort_keys: bool = False) -> str:
    """JSON with a newline at its end. Keys keep their order; NaN and infinity are ValueErrors."""
    return json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False) + "\n"


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!a} occurs twice")
        found[key] = value
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
