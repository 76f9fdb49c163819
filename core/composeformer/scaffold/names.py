"""What a new plugin is called: its distribution, its package and its kind, none of them taken or impossible.

A distribution's name is compared as PyPI does (PEP 503); its package has that name with underscores, and is the name
of the entry point too.
"""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path

import attrs

from composeformer.discovery import canonical
from composeformer.errors import InputError, Problem
from composeformer.plugins import Plugins, current

_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# As long as the lines of the templates have room for.
LONGEST = 40
# A codec is used by a precision, which comes with it under its name.
BESIDE = {"codec": ("precision",)}


@attrs.frozen(kw_only=True)
class Names:
    """`distribution` for pip, `package` for import and for the entry point, `kind` for specs."""

    distribution: str
    package: str
    kind: str


def named(name: str, slot: str, kind: str | None = None) -> Names:
    """The names of a plugin called `name`, with a component of `slot` and `kind`, by default its distribution's name.

    Raises InputError, with a line for each, where names are impossible or taken.
    """
    plugins = current()
    distribution_name = canonical(name)
    package = distribution_name.replace("-", "_")
    problems = list(_of_package(name, distribution_name, package, plugins))
    # A kind that is the name would be told the same again.
    if kind is not None or not problems:
        kind = distribution_name if kind is None else kind
        problems += _of_kind(slot, kind, plugins)
    if kind is None or problems:
        raise InputError(*(str(problem) for problem in problems))
    return Names(distribution=distribution_name, package=package, kind=kind)


def _of_package(name: str, distribution_name: str, package: str, plugins: Plugins) -> Iterable[Problem]:
    """The first thing that is wrong with the name of the package."""
    wrong = _impossible(name, package) or _taken(distribution_name, package, plugins)
    if wrong is not None:
        yield Problem("name", name, wrong)


def _impossible(name: str, package: str) -> str | None:
    if _DISTRIBUTION.fullmatch(name) is None:
        return "must be letters and digits of ASCII, with '-', '_' and '.' between them"
    if len(name) > LONGEST:
        return f"must have at most {LONGEST} characters"
    if not package.isidentifier():
        return f"its package {package!r} can not be imported: a module's name begins with a letter"
    if iskeyword(package):
        return f"its package {package!r} can not be imported: Python has a keyword of that name"
    if package in sys.stdlib_module_names:
        return f"its package {package!r} would hide the module of Python's standard library"
    return None


def _taken(distribution_name: str, package: str, plugins: Plugins) -> str | None:
    for info in plugins.infos:
        if distribution_name in (canonical(info.name), canonical(info.distribution)):
            return f"is the name of an installed plugin: {info}"
    try:
        return f"is installed: {distribution_name} {distribution(distribution_name).version}"
    except PackageNotFoundError:
        found = find_spec(package)
    if found is None or _only_here(found.submodule_search_locations, found.origin):
        return None
    return f"its package {package!r} is installed: {found.origin or 'a namespace of several distributions'}"


def _only_here(folders: Iterable[str] | None, origin: str | None) -> bool:
    """Whether a name is nothing but a folder without code in the current one, where `python -m` looks too."""
    return origin is None and all(Path(folder).resolve().parent == Path.cwd() for folder in folders or ())


def _of_kind(slot: str, kind: str, plugins: Plugins) -> Iterable[Problem]:
    if _KIND.fullmatch(kind) is None:
        yield Problem("kind", kind, "a kind is made of letters, digits, '-', '_' and '.'")
        return
    if len(kind) > LONGEST:
        yield Problem("kind", kind, f"must have at most {LONGEST} characters")
    for each in (slot, *BESIDE.get(slot, ())):
        owners = [i for i in plugins.infos if any((c.slot, c.kind) == (each, kind) for c in i.components)]
        if owners:
            by = " and ".join(str(owner) for owner in owners)
            yield Problem("kind", kind, f"is a {each} of plugin {by}; choose another by --kind")
