"""The files of a Hugging Face folder that belong to its tokenizer: which they are, reading and carrying them
over.

Folders come from anywhere. A file is taken only when it is a regular file whose real place is inside the
folder (see `copy_tokenizer` for the Hugging Face cache's links), and only up to a size.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from composeformer.errors import FolderError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "added_tokens.json",
)
MAX_BYTES = 256 << 20


def copy_tokenizer(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> list[str]:
    """Copy those of TOKENIZER_FILES that `src` has, byte for byte, into the existing folder `dst`; returns
    their names.

    Raises FolderError for a link that leads outside `src`, anything that is not a regular file, and a file
    larger than MAX_BYTES. A link into the `blobs` beside a `snapshots` folder is how the Hugging Face cache
    stores files, and counts as inside.
    """
    src, dst = Path(src), Path(dst)
    found = [path for name in TOKENIZER_FILES if (path := _inside(src, name)) is not None]
    # All are checked before the first is copied.
    for path in found:
        try:
            shutil.copyfile(path, dst / path.name)
        except OSError as problem:
            raise FolderError(f"{path}: can not be copied to {dst}: {problem.strerror}") from None
    return [path.name for path in found]


def read_text(folder: Path, name: str) -> str | None:
    """The text of a file in `folder`, None where there is none. Raises FolderError."""
    path = _inside(folder, name)
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FolderError(f"{path}: not UTF-8") from None
    except OSError as problem:
        raise FolderError(f"{path}: can not be read: {problem.strerror}") from None


def read_json(folder: Path, name: str) -> dict[str, object]:
    """The JSON object in a file in `folder`, {} where there is none. Raises FolderError."""
    text = read_text(folder, name)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise FolderError(f"{folder / name}: not JSON: {problem}") from None
    if not isinstance(value, dict):
        raise FolderError(f"{folder / name}: must be a JSON object, found {type(value).__name__}")
    return value


def read_chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    """The chat template of a folder whose tokenizer_config.json is `config`.

    `chat_template.jinja` comes first, as in transformers; then the key `chat_template`, a string or a list of
    named templates, of which the one named `default` is taken, or the only one.
    """
    text = read_text(folder, "chat_template.jinja")
    if text is not None:
        return text
    value = config.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    if not isinstance(value, list):
        raise FolderError(f"{where}: must be a string or a list of named templates")
    named: dict[str, str] = {}
    for entry in value:
        name, template = (
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(template, str):
            raise FolderError(f"{where}: every entry of the list must have a name and a template")
        named[name] = template
    if "default" not in named and len(named) > 1:
        raise FolderError(f"{where}: of {', '.join(named)} none is named default")
    return named.get("default", next(iter(named.values()), None))


def _inside(folder: Path, name: str) -> Path | None:
    path = folder / name
    try:
        if not path.is_symlink() and not path.exists():
            return None
        real = path.resolve(strict=True)
        home = folder.resolve(strict=True)
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if not real.is_relative_to(home) and real.parent != blobs:
            raise FolderError(f"{path}: a link that leads out of the folder, to {real}")
        if not real.is_file():
            raise FolderError(f"{path}: not a regular file")
        size = real.stat().st_size
    except (OSError, RuntimeError) as problem:
        raise FolderError(
            f"{path}: can not be read: {getattr(problem, 'strerror', None) or problem}"
        ) from None
    if size > MAX_BYTES:
        raise FolderError(f"{path}: {size} bytes, at most {MAX_BYTES} are allowed")
    return path
