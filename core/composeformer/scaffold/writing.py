"""A new package appears whole or not at all: written beside its place, then renamed into it.

`folder.atomic` does that for models; it flushes every file, for weights are dear, and needs torch. A plugin that was
not written is written again.
"""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

import attrs

from composeformer.errors import FolderError
from composeformer.hookspecs import API_RANGE
from composeformer.scaffold.names import Names, named
from composeformer.scaffold.starts import start_of

# What stands where: files that every plugin has, and those of its slot.
COMMON = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    ".gitignore": "gitignore",
    "tests/test_laws.py": "laws.py",
}
OF_SLOT = {
    "example.toml": "example.toml",
    "{package}/plugin.py": "plugin.py",
    "{package}/module.py": "module.py",
}


@attrs.frozen(kw_only=True)
class Created:
    """A plugin that was written: where, what it is called, and the lines of each file by its name."""

    folder: Path
    names: Names
    slot: str
    lines: Mapping[str, int]

    @property
    def code_lines(self) -> int:
        """Lines of the two files that are the plugin."""
        return sum(self.lines[f"{self.names.package}/{name}.py"] for name in ("plugin", "module"))


def create(
    name: str, slot: str, folder: str | os.PathLike[str] | None = None, kind: str | None = None
) -> Created:
    """Writes a plugin with a component of `slot`, by default into a folder of its name in the current one.

    Raises InputError for names that are impossible or taken, or a slot that nothing reads; FolderError for a folder
    that is there and not empty, or that can not be written. Nothing is left of what failed.
    """
    start_of(slot)
    names = named(name, slot, kind)
    texts = rendered(names, slot)
    target = Path(names.distribution if folder is None else folder)
    try:
        _write(target, texts)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise FolderError(f"{target}: can not be written: {reason}") from error
    return Created(
        folder=target, names=names, slot=slot, lines={n: len(t.splitlines()) for n, t in texts.items()}
    )


def rendered(names: Names, slot: str) -> dict[str, str]:
    """The text of every file by its name in the package's folder."""
    start = start_of(slot)
    words = {
        **attrs.asdict(names),
        "slot": slot,
        "summary": start.summary,
        "advice": start.advice,
        "requires": API_RANGE,
    }
    words["example"] = _filled(f"{slot}/example.toml", words)
    texts = {place: _filled(f"common/{name}", words) for place, name in COMMON.items()}
    texts |= {
        place.format(package=names.package): _filled(f"{slot}/{name}", words)
        for place, name in OF_SLOT.items()
    }
    texts[f"{names.package}/__init__.py"] = ""
    return dict(sorted(texts.items()))


def _filled(template: str, words: Mapping[str, str]) -> str:
    found = files("composeformer.scaffold") / "templates" / f"{template}.txt"
    return Template(found.read_text(encoding="utf-8")).substitute(words)


def _write(target: Path, texts: Mapping[str, str]) -> None:
    target = Path(os.path.realpath(target))
    _check_free(target)
    top = next(parent for parent in target.parents if parent.is_dir())
    beside = target.parent / f".{target.name}.new-{secrets.token_hex(4)}"
    try:
        for name, text in texts.items():
            path = beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        _check_free(target)
        if target.is_dir():
            target.rmdir()  # an empty one; not everywhere does a rename take its place
        os.rename(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        for parent in _up_to(target.parent, top):
            parent.rmdir()
        raise


def _check_free(target: Path) -> None:
    if target.is_dir():
        if os.listdir(target):
            raise FolderError(f"{target}: the folder exists and is not empty; nothing was written")
    elif target.exists():
        raise FolderError(f"{target}: is a file, not a folder; nothing was written")


def _up_to(folder: Path, top: Path) -> Iterator[Path]:
    """`folder` and those above it, below `top`: the ones that were made."""
    while folder != top:
        yield folder
        folder = folder.parent
