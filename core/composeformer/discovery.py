"""Which plugins are installed, read from the metadata of distributions: nothing is imported here.

A plugin is an entry point of the group `composeformer`. The versions of composeformer that it works
with are its distribution's requirement on composeformer (Requires-Dist), so that a mismatch is known,
and told by name, before any of its code runs.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, distributions

import attrs

from composeformer.errors import PluginError, nearest, one_of

GROUP = "composeformer"
BUILTIN = "composeformer"
_OURS = re.compile(r"\s*composeformer(?![A-Za-z0-9._-])", re.IGNORECASE)


@attrs.frozen(eq=False, kw_only=True)
class Candidate:
    """An entry point that was found; `refusal` is the reason why it must not be imported, if there is one."""

    name: str
    distribution: str
    version: str | None
    value: str
    entry_point: EntryPoint | None
    requires: str | None = None
    refusal: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What a user may call it: its name, its distribution (with all it brings), or both."""
        owner = canonical(self.distribution)
        return canonical(self.name), owner, f"{owner}:{canonical(self.name)}"


def canonical(name: str) -> str:
    """A name as PyPI compares it: `My_Plugin` is `my-plugin`."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def find(entry_points: Iterable[EntryPoint] | None = None) -> list[Candidate]:
    """The installed plugins, or those given: composeformer's own first, then by name; each once."""
    found = (
        _installed() if entry_points is None else (c for e in entry_points for c in _candidates([e], e.dist))
    )
    unique: dict[tuple[str, str], Candidate] = {}
    for candidate in found:
        unique.setdefault((canonical(candidate.distribution), candidate.name), candidate)
    return sorted(unique.values(), key=_place)


def _place(candidate: Candidate) -> tuple[bool, str, str]:
    return canonical(candidate.distribution) != BUILTIN, candidate.name, candidate.distribution


def select(
    candidates: Sequence[Candidate], blocked: Iterable[str] = (), allowed: Iterable[str] | None = None
) -> dict[Candidate, str]:
    """The candidates that are not to be loaded, with the reason.

    Raises PluginError for a name that is no plugin.
    """
    blocked = _known(candidates, blocked, "--no-plugin")
    listed = None if allowed is None else _known(candidates, allowed, "COMPOSE_PLUGINS")
    reasons = {}
    for candidate in candidates:
        if blocked.intersection(candidate.names):
            reasons[candidate] = "blocked by --no-plugin"
        elif listed is not None and listed.isdisjoint(candidate.names):
            reasons[candidate] = "not listed in COMPOSE_PLUGINS"
    return reasons


def _known(candidates: Sequence[Candidate], names: Iterable[str], option: str) -> set[str]:
    known = {name for candidate in candidates for name in candidate.names}
    installed = one_of(candidate.name for candidate in candidates)
    lines = []
    for name in names:
        if canonical(name) not in known:
            near = nearest(canonical(name), known)
            hint = "" if near is None else f"; did you mean {near!r}?"
            lines.append(f"{option} {name}: no such plugin; installed: {installed}{hint}")
    if lines:
        raise PluginError(*lines)
    return {canonical(name) for name in names}


def _installed() -> Iterator[Candidate]:
    # Reading the text is far cheaper than parsing every distribution's metadata.
    seen = set()
    for found in distributions():
        if not _names_group(found):
            continue
        name = _field(found, "Name")
        if canonical(name or "") in seen:
            continue
        seen.add(canonical(name or ""))
        first = _first(name, found)
        try:
            points = [e for e in first.entry_points if e.group == GROUP]
        except Exception as error:
            yield _unreadable(first, error)
        else:
            yield from _candidates(points, first)


def _names_group(found: Distribution) -> bool:
    try:
        return f"[{GROUP}]" in (found.read_text("entry_points.txt") or "")
    except (OSError, UnicodeError):
        return False


def _first(name: str | None, found: Distribution) -> Distribution:
    """The distribution of that name whose modules an import finds: the first one on the path."""
    try:
        return distribution(name) if name else found
    except (PackageNotFoundError, ValueError):
        return found


def _unreadable(owner: Distribution, error: Exception) -> Candidate:
    name = _field(owner, "Name") or "unnamed"
    refusal = f"its entry_points.txt can not be read: {type(error).__name__}: {error}"
    return Candidate(
        name=name,
        distribution=name,
        version=_field(owner, "Version"),
        value="",
        entry_point=None,
        refusal=refusal,
    )


def _candidates(points: Iterable[EntryPoint], owner: Distribution | None) -> list[Candidate]:
    # Every question about a distribution parses its metadata again.
    name = (_field(owner, "Name") if owner else None) or "unnamed distribution"
    version = _field(owner, "Version") if owner else None
    requires, refusal = (None, None) if owner is None or canonical(name) == BUILTIN else _requirement(owner)
    return [
        Candidate(
            name=point.name,
            distribution=name,
            version=version,
            value=point.value,
            entry_point=point,
            requires=requires,
            refusal=refusal,
        )
        for point in points
    ]


def _field(owner: Distribution, key: str) -> str | None:
    metadata = owner.metadata
    # Not `get`, which the metadata of Python 3.11 need not have.
    return metadata[key] if key in metadata else None  # noqa: SIM401


def own_version() -> str | None:
    """The version of the composeformer that runs; None when it runs from a folder that is not installed."""
    try:
        return _field(distribution(BUILTIN), "Version")
    except PackageNotFoundError:
        return None


def _requirement(owner: Distribution) -> tuple[str | None, str | None]:
    """What a distribution requires of composeformer in this environment, and why that is not met, if so."""
    lines = [line for line in owner.requires or () if _OURS.match(line)]
    if not lines:
        return None, None
    # Costs more than all the rest of this module, and composeformer's own plugins do without.
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.specifiers import SpecifierSet

    try:
        parsed = [Requirement(line) for line in lines]
    except InvalidRequirement as error:
        return lines[0], f"its requirement {lines[0]!r} can not be read: {str(error).splitlines()[0]}"
    asked = [r.specifier for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not asked:
        return None, None
    specifier = SpecifierSet(",".join(str(each) for each in asked if str(each)))
    version = own_version()
    requires = f"{BUILTIN}{specifier}"
    # A pre-release of composeformer is one that its user chose: it counts by its place in the order.
    if version is None or specifier.contains(version, prereleases=True):
        return requires, None
    return requires, f"it requires {requires}, and this is composeformer {version}"
