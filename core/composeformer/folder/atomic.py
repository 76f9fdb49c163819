"""A model folder appears whole or not at all: written beside its place, flushed, then renamed into it.

The steps are those of any crash-safe writer: a temporary folder on the same file system, fsync of every file
and folder, one rename, fsync of the parent. The temporary folder is locked while its writer lives, so that
the next writer can tell what a killed one left behind.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from composeformer.errors import FolderError, one_of
from composeformer.folder import lock, strict_json, swap
from composeformer.folder.paths import CONFIG, INDEX, LOCK, MANIFEST, SPEC, SUFFIX, reason_of
from composeformer.folder.strict_json import dumps
from composeformer.folder.sync import sync, sync_tree
from composeformer.text.files import TOKENIZER_FILES


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; when the block ends without an exception it becomes `target`.

    Missing parents are made. A killed writer or an exception leaves the old content, or nothing, at `target`;
    the next call for the same target removes the remains. Raises FolderError, before the block runs, if
    `target` is not a folder, or not empty without `replace`, or with `replace` does not look like a model
    folder or holds what is no part of one; and at the end for what the system refuses (a full disk, a
    read-only place), also inside the block.
    """
    target = Path(os.path.realpath(target))
    try:
        top = _make_parents(target.parent)
        # Before the check: a killed writer may have put aside what belongs at the target.
        _clear_remains(target)
        _check_target(target, replace)
        folder, held = _make(target)
    except OSError as error:
        raise FolderError(f"{target}: can not be written: {_told(error)}") from error
    try:
        with held:
            try:
                yield folder
                sync_tree(folder)
                _check_target(target, replace)
                swap.publish(folder, target)
                for parent in _up_to(target.parent, top):
                    sync(parent)
            except OSError as error:
                raise FolderError(f"{target}: writing failed: {_told(error)}") from error
    finally:
        # After a swap this is the old content, after a plain rename nothing.
        shutil.rmtree(folder, ignore_errors=True)


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """A new file of these bytes, one after the other. Raises OSError, which names the file."""
    try:
        with open(path, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """A new UTF-8 file, with the newlines as they are."""
    write_chunks(path, [text.encode()])


def write_json(path: Path, value: object) -> None:
    """A new JSON file; keys keep their order."""
    write_text(path, dumps(value))


def _check_target(target: Path, replace: bool) -> None:
    try:
        names = set(os.listdir(target))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise FolderError(f"{target}: is a file, not a folder") from None
    except OSError as error:
        raise FolderError(f"{target}: can not be read: {reason_of(error)}") from error
    if not names:
        return
    if not replace:
        raise FolderError(f"{target}: the folder exists and is not empty")
    if not any((target / name).is_file() for name in (SPEC, CONFIG, MANIFEST)):
        raise FolderError(
            f"{target}: will not be replaced: no model folder, it holds none of {SPEC}, {CONFIG}, {MANIFEST}"
        )
    if ".git" in names:
        raise FolderError(f"{target}: will not be replaced: it holds .git, whose history would be lost")
    if Path(os.path.realpath(os.curdir)).is_relative_to(target):
        raise FolderError(f"{target}: will not be replaced: it is or holds the current folder")
    if strangers := _strangers(target, names):
        raise FolderError(
            f"{target}: will not be replaced: it holds what is no part of a model: {one_of(strangers)}"
        )


def _strangers(target: Path, names: set[str]) -> list[str]:
    """What a model folder holds beside a model's files: somebody put it there, and would lose it."""
    known = {SPEC, CONFIG, MANIFEST, LOCK, INDEX, *TOKENIZER_FILES, *_listed(target)}
    return [
        ascii(name)[1:-1]
        for name in sorted(names)
        if not (target / name).is_file() or (name not in known and not name.endswith(SUFFIX))
    ]


def _listed(target: Path) -> set[str]:
    """The files that the folder's manifest names, as written with it."""
    try:
        found = strict_json.read(target / MANIFEST)[0]
    except FolderError:
        return set()
    files = found.get("files") if isinstance(found, dict) else None
    return set(files) if isinstance(files, dict) else set()


def _make_parents(parent: Path) -> Path:
    """Makes what is missing of `parent`; the deepest folder that was there before."""
    top = parent
    while not top.is_dir() and top != top.parent:
        top = top.parent
    parent.mkdir(parents=True, exist_ok=True)
    return top


def _up_to(folder: Path, top: Path) -> Iterator[Path]:
    yield folder
    while folder not in (top, folder.parent):
        folder = folder.parent
        yield folder


def _make(target: Path) -> tuple[Path, lock.Lock]:
    # A cleaner may remove the folder between its making and its locking; then another one is made.
    while True:
        folder = target.parent / f".{target.name}.incomplete-{secrets.token_hex(4)}"
        folder.mkdir()
        held = lock.take(folder, wait=True)
        if held is not None:
            return folder, held


def _clear_remains(target: Path) -> None:
    """Undoes what killed writers of `target` left beside it; what a living one holds stays."""
    swap.recover(target)
    pattern = re.compile(re.escape(f".{target.name}.incomplete-") + "[0-9a-f]{8}")
    for path in target.parent.iterdir():
        if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        held = None
        with suppress(OSError):
            held = lock.take(path, wait=False)
        if held is not None:
            with held:
                shutil.rmtree(path, ignore_errors=True)


def _told(error: OSError) -> str:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{names[0]}: {reason_of(error)}" if names else reason_of(error)
