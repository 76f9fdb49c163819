"""Every file of a model folder with its size and SHA-256, so that damage is found before it is computed with.

`manifest.json` is written last and in one spelling only: a changed byte in it is found like any other.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from composeformer.errors import FolderError
from composeformer.folder import header, strict_json
from composeformer.folder.atomic import write_text
from composeformer.folder.paths import MANIFEST, WEIGHT_SUFFIXES, inside, reason_of

FORMAT = 1

_DIGEST = re.compile("[0-9a-f]{64}")


def write_manifest(folder: Path) -> None:
    """Writes `manifest.json` over the files of `folder`. Raises FolderError for what is no plain file."""
    files = {}
    for name in sorted(os.listdir(folder)):
        path = inside(folder, name, source="the manifest")
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    write_text(folder / MANIFEST, _spell(files))


def check_manifest(folder: Path, *, hashes: bool) -> list[str]:
    """What differs from the manifest, one line per file; empty if nothing does.

    Compares sizes, and with `hashes` reads every byte. Files that the manifest does not list are reported
    only if they are weights. A missing or damaged manifest is reported, not raised.
    """
    path = folder / MANIFEST
    try:
        found, data = strict_json.read(inside(folder, MANIFEST))
        files = _files(path, found)
    except FolderError as error:
        return list(error.lines)
    if files is None or data != _spell(files).encode():
        return [f"{path}: damaged or edited: not the text that was written"]
    problems = [line for name, file in files.items() for line in _check(folder, name, file, hashes)]
    extra = sorted(set(os.listdir(folder)) - set(files) - {MANIFEST})
    problems += [
        f"{folder / name}: a weight file that {MANIFEST} does not list: it was added later"
        for name in extra
        if name.lower().endswith(WEIGHT_SUFFIXES)
    ]
    return problems


def _check(folder: Path, name: str, file: dict[str, Any], hashes: bool) -> list[str]:
    try:
        path = inside(folder, name, source=MANIFEST)
        actual = path.stat().st_size
        if actual != file["size"]:
            with open(path, "rb") as opened:
                start = opened.read(len(header.LFS))
            if header.is_pointer(start):
                return [f"{path}: expected {file['size']:,} bytes, found {actual:,}: {header.POINTER}"]
            return [f"{path}: {header.sizes(file['size'], actual)}"]
        if hashes and _sha256(path) != file["sha256"]:
            return [
                f"{path}: {actual:,} bytes as expected, but another content (SHA-256):"
                " probably edited, or damaged by a disk or a transfer"
            ]
    except FolderError as error:
        # A line that starts with the file needs no more to say where.
        return [
            line.removeprefix(f"{MANIFEST}: ") if f": {folder / name}: " in line else line
            for line in error.lines
        ]
    except OSError as error:
        return [f"{folder / name}: can not be read: {reason_of(error)}"]
    return []


def _files(path: Path, found: Any) -> dict[str, dict[str, Any]] | None:
    """The table of files, or None if `found` is not a manifest."""
    if not isinstance(found, dict) or set(found) != {"format", "files"}:
        return None
    if type(found["format"]) is int and found["format"] != FORMAT:
        raise FolderError(f"{path}: format = {found['format']}: this version reads {FORMAT}")
    files = found["files"]
    if not isinstance(files, dict):
        return None
    for entry in files.values():
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            return None
        if type(entry["size"]) is not int or entry["size"] < 0:
            return None
        if not isinstance(entry["sha256"], str) or not _DIGEST.fullmatch(entry["sha256"]):
            return None
    return files


def _spell(files: dict[str, dict[str, Any]]) -> str:
    return strict_json.dumps({"format": FORMAT, "files": files}, sort_keys=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
