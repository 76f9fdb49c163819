"""The file names of a model folder, and the one door through which a name read from a file becomes a path.

An index or a manifest is input: its values are names of files beside it, nothing else. Joined unchecked, they
read any file of the machine; here every other spelling is refused by name.
"""

import os
import re
from pathlib import Path

from composeformer.errors import FolderError, nearest

SPEC = "spec.toml"
CONFIG = "config.json"
LOCK = "compose.lock"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"

# Formats that unpickle, and so run what the file says, when they are read.
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
WEIGHT_SUFFIXES = (SUFFIX, *PICKLED, ".gguf", ".h5", ".msgpack", ".npz", ".onnx")

_DRIVE = re.compile(r"[A-Za-z]:")


def inside(root: Path, name: str, *, source: str = "") -> Path:
    """The regular file `name` directly in `root`. `source` says in errors where the name came from.

    Raises FolderError for a name that is not one plain file name, for a link that leaves the folder, and for
    what is missing or not a regular file. The files of a download cache of the Hugging Face Hub are links
    into the `blobs` folder of the same repository: these count as inside.
    """
    where = f"{source}: " if source else ""
    reason = _unsafe(name)
    if reason is not None:
        raise FolderError(f"{where}{_quoted(name)} is not the name of a file in {root}: {reason}")
    path = root / name
    try:
        real = path.resolve(strict=True)
        home = root.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise FolderError(f"{where}{path}: {_missing(root, name, error)}") from error
    if real.parent != home and real.parent != _hub_blobs(home):
        raise FolderError(
            f"{where}{path} is a link that leaves the folder, to {real}: copy the file here instead"
        )
    if not real.is_file():
        raise FolderError(f"{where}{path} is not a regular file")
    return path


def _unsafe(name: str) -> str | None:
    if name in ("", ".", ".."):
        return "it names no file"
    if "\0" in name:
        return "it holds a NUL character"
    if "/" in name or "\\" in name:
        return "it holds a path separator"
    if _DRIVE.match(name):
        return "it starts with a drive letter"
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        return "it is not valid Unicode"
    return None


def _hub_blobs(home: Path) -> Path | None:
    repository = home.parent.parent
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        return repository / "blobs"
    return None


def _missing(root: Path, name: str, error: Exception) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"can not be opened: {reason_of(error)}"
    if not root.is_dir():
        return "there is no such folder"
    near = nearest(name, sorted(os.listdir(root)))
    return "the file is missing" + (f"; there is {near!r}" if near not in (None, name) else "")


def _quoted(name: str) -> str:
    text = ascii(name)
    return text if len(text) <= 120 else text[:117] + "..."


def reason_of(error: Exception) -> str:
    """What went wrong, in the system's words, on one line."""
    text = (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else str(error) or type(error).__name__
    )
    return text.splitlines()[0] if text.strip() else type(error).__name__
