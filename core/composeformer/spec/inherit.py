"""Inheritance: a document with all that it `extends`, and with overrides, as one.

`extends` names a shipped spec, or a file by a path relative to the file that says it. A name with a separator
or a `.toml` at its end is a path, any other a shipped spec; shipped names are looked up in a list and never
become paths. What `merge` does to tables, arrays and parts holds for every step.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from composeformer.errors import Problem, SpecError, nearest, one_of
from composeformer.plugins import current
from composeformer.spec.document import Document, FileError, parse, printable, read
from composeformer.spec.merge import merge
from composeformer.spec.overrides import apply_all
from composeformer.spec.unverified import carried

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["load", "merge", "resolve", "shipped"]

MAX_EXTENDS = 16


def load(ref: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Document:
    """The resolved document of a `.toml` path, a model folder or a shipped spec's bare name, with overrides.

    Raises ComposeError, in one line, for what can not be found, read or merged.
    """
    name = os.fsdecode(ref)
    if isinstance(ref, str) and not _is_path(name) and not _is_model(name):
        found = _shipped(name, pathlib.Path())
    else:
        # A model folder holds its spec.
        inside = os.path.join(name, "spec.toml")
        name = inside if os.path.isfile(inside) else name
        found = _file(pathlib.Path(name), name)
    return _resolved(found, overrides)


def resolve(document: Document, base: pathlib.Path | None, overrides: Sequence[str] = ()) -> Document:
    """`document` with what it extends and with overrides; its paths are relative to the folder `base`.

    Without a `base` it can extend only shipped specs. Raises ComposeError as `load` does.
    """
    return _resolved(_Found(document, base, os.path.realpath(document.name)), overrides)


def shipped() -> list[str]:
    """The names of the specs that come with composeformer and its plugins."""
    return sorted({*_texts(), *_from_plugins()})


@attrs.frozen
class _Found:
    """A document, the folder that its paths are relative to, and what tells its file from every other."""

    document: Document
    base: pathlib.Path | None
    identity: str


def _resolved(found: _Found, overrides: Sequence[str]) -> Document:
    chain = [found]
    while "extends" in chain[-1].document.data:
        parent = _parent(chain[-1])
        if parent.identity in {link.identity for link in chain}:
            names = [printable(link.document.name) for link in (*chain, parent)]
            raise _wrong(chain[-1], f"a spec can not extend itself ({' -> '.join(names[-4:])})")
        if len(chain) > MAX_EXTENDS:
            raise _wrong(chain[-1], f"more than {MAX_EXTENDS} specs extend one another")
        chain.append(parent)
    merged = chain[-1].document
    for link in reversed(chain[:-1]):
        merged = carried(merged, merge(merged, link.document))
    merged.data = {key: value for key, value in merged.data.items() if key != "extends"}
    merged.sources = {path: source for path, source in merged.sources.items() if path[:1] != ("extends",)}
    return carried(merged, apply_all(merged, overrides))


def _parent(child: _Found) -> _Found:
    """What `child` extends. Raises SpecError at its `extends` line when that is not there or not readable."""
    name = child.document.data["extends"]
    if not isinstance(name, str):
        raise _wrong(child, "must be the name of a shipped spec or the path of a file, as a string")
    try:
        if not _is_path(name):
            return _shipped(name, child.base)
        if child.base is None:
            raise FileError(name, "a path needs a file that it is relative to; name a shipped spec")
        # Joined to the label too, so that errors name the file as seen from where the user is.
        label = os.path.join(os.path.dirname(child.document.name), name)
        return _file(child.base / name, label)
    except FileError as error:
        raise _wrong(child, error.reason) from None


def _wrong(link: _Found, allowed: str) -> SpecError:
    source = link.document.source(("extends",))
    return SpecError([Problem("extends", link.document.data["extends"], allowed, None, source)])


def _is_path(name: str) -> bool:
    separators = {"/", os.sep, os.altsep or os.sep}
    return name.endswith(".toml") or name in (".", "..") or any(mark in name for mark in separators)


def _is_model(name: str) -> bool:
    """Whether a bare name is a model folder here, and no shipped spec, which comes first."""
    return bool(name) and os.path.isfile(os.path.join(name, "spec.toml")) and name not in shipped()


def _file(path: pathlib.Path, label: str) -> _Found:
    try:
        document = read(path, label)
    except FileError as error:
        if os.path.lexists(path):
            raise
        raise FileError(error.label, f"{error.reason}; {_choices(path.stem)}") from None
    return _Found(document, path.parent, os.path.realpath(path))


def _shipped(name: str, folder: pathlib.Path | None) -> _Found:
    """A shipped spec; only where there is none is `folder` searched for a file that may have been meant."""
    text: Traversable | pathlib.Path | None = _texts().get(name)
    label = f"composeformer/specs/{name}.toml"
    if text is None and (owned := _from_plugins().get(name)):
        if len(owned) > 1:
            owners = " and ".join(owner for owner, _ in owned)
            raise FileError(
                printable(name), f"{owners} both ship a spec of this name; block one with --no-plugin"
            )
        owner, text = owned[0]
        label = f"{owner}/{name}.toml"
    if text is None:
        reason = f"no shipped spec has this name; {_choices(name)}"
        for file in (name, f"{name}.toml", f"{name}/spec.toml"):
            if folder is not None and name and os.path.isfile(folder / file):
                reason += f"; for the file write ./{file}"
                break
        else:
            if folder is not None and name and os.path.lexists(folder / name):
                reason = f"{_kind(folder / name)}; {reason}"
        raise FileError(printable(name), printable(reason))
    document = parse(text.read_bytes(), label)
    document.name = name
    return _Found(document, None, f"shipped {name}")


def _kind(path: pathlib.Path) -> str:
    """What stands at a path where no spec is."""
    if path.is_dir():
        return "is a folder without a spec.toml"
    return "is neither a file nor a folder" if path.exists() else "is a link that leads nowhere"


def _choices(name: str) -> str:
    names = shipped()
    close = nearest(name, names)
    return f"shipped specs: {one_of(names)}" + (f"; did you mean {close!r}?" if close else "")


def _texts() -> "dict[str, Traversable]":
    # Imported here: it is slow, and most runs name a file.
    from importlib.resources import files

    folder = files("composeformer") / "specs"
    if not folder.is_dir():
        return {}
    return {text.name.removesuffix(".toml"): text for text in folder.iterdir() if text.name.endswith(".toml")}


def _from_plugins() -> "dict[str, list[tuple[str, Traversable | pathlib.Path]]]":
    """Plugins' own specs by name, each with its plugin."""
    found: dict[str, list[tuple[str, Traversable | pathlib.Path]]] = {}
    for info in current().infos:
        for text in info.specs:
            found.setdefault(text.name.removesuffix(".toml"), []).append((info.name, text))
    return found
