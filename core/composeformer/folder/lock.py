"""Which temporary folders have a living owner: a lock on the folder itself, which dies with them.

Unlike a process number in the name, a lock can not be mistaken after the number is used again or by another
machine of a shared file system. Where a file system can not lock folders, nothing is held and nothing is
cleared.
"""

import os
import sys
from pathlib import Path
from types import TracebackType

if sys.platform != "win32":
    import fcntl


class Lock:
    """A held lock; leaving its block lets it go. `descriptor` is None where the system has no such locks."""

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def take(folder: Path, *, wait: bool) -> Lock | None:
    """Locks `folder`. None if it is gone, if another holds it, or, without `wait`, if it can not be locked.

    With `wait` a file system without locks gives a Lock that holds nothing: its owner can still write, and
    cleaners, who do not wait, get None. Raises OSError if the folder can not be opened.
    """
    if sys.platform == "win32":
        return Lock(None) if wait else None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return Lock(None) if wait else None
    if not _same(folder, descriptor):
        os.close(descriptor)
        return None
    return Lock(descriptor)


def _same(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False
