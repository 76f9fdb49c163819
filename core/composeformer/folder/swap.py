"""One folder takes the place of another: in one step where the system can, else in two renames.

Linux exchanges with renameat2(2). Elsewhere, and on file systems that lack it, the old folder steps aside
first; a writer killed between the two renames leaves the old content under the aside name, and `recover`
brings it back.
"""

import ctypes
import errno
import os
import re
import shutil
import sys
from pathlib import Path

from composeformer.errors import FolderError
from composeformer.folder import lock
from composeformer.folder.sync import sync

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def publish(folder: Path, target: Path) -> None:
    """`folder` becomes `target`; what was there is deleted, or left at `folder` for the caller."""
    if not target.is_dir() or not os.listdir(target):
        try:
            os.rename(folder, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FolderError(f"{target}: not written: another process filled it meanwhile") from error
            raise
    elif not exchange(folder, target):
        aside = _aside(folder)
        try:
            os.rename(target, aside)
            os.rename(folder, target)
        except BaseException:
            recover(target, own=aside)
            raise
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step. False where the system has no such step; OSError if it failed."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    if renameat2(*paths, ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


def recover(target: Path, *, own: Path | None = None) -> None:
    """Ends the two renames of a writer that was killed: what it put aside is put back, or deleted.

    What a living writer put aside is left to it, save `own`, which is the caller's.
    """
    pattern = re.compile(re.escape(f".{target.name}.previous-") + "([0-9a-f]{8})")
    for aside in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(aside.name)
        if match is None or aside.is_symlink():
            continue
        if aside != own and _alive(target.parent / f".{target.name}.incomplete-{match[1]}"):
            continue
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, target)


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name.replace(".incomplete-", ".previous-"))


def _alive(folder: Path) -> bool:
    """Whether the writer of a temporary folder may still run; a folder that is gone has none."""
    if not folder.is_dir():
        return False
    try:
        held = lock.take(folder, wait=False)
    except OSError:
        return True
    if held is None:
        return folder.is_dir()
    with held:
        return False
