"""What was written, on the disk: fsync of files and of the folders that name them."""

import os
from pathlib import Path


def sync_tree(folder: Path) -> None:
    """Every file and folder below `folder`, and `folder` itself, on the disk."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(place, name))
        sync(Path(place))


def sync(path: Path) -> None:
    """One file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
