"""Loading plugins so that a broken one costs nobody else: found, imported, asked and judged one by one.

Each plugin has a pluggy manager of its own: an error can neither leave a part of it registered nor
reach the results of another. What went wrong is told once on the logger `composeformer`, and kept in
its `PluginInfo`.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import EntryPoint
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import attrs
import pluggy

from composeformer import discovery, hookspecs, vetting
from composeformer.discovery import Candidate
from composeformer.errors import PluginError, nearest, one_of
from composeformer.registry import PluginInfo, Registry

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["PluginInfo", "Plugins", "Selection", "configure", "current", "load_plugins", "selection"]

logger = logging.getLogger("composeformer")
HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("compose_"))


class Plugins:
    """One set of plugins, loaded: their components, and the files of dialects, specs, topologies and hardware that they
    ship, in order.
    """

    def __init__(self, infos: Iterable[PluginInfo] = ()) -> None:
        self.registry = Registry(infos)
        self.infos = self.registry.infos
        self.dialect_files: tuple[Traversable | Path, ...] = tuple(
            f for info in self.infos for f in info.dialects
        )
        self.spec_files: tuple[Traversable | Path, ...] = tuple(f for info in self.infos for f in info.specs)
        self.topology_files: tuple[Traversable | Path, ...] = tuple(
            f for info in self.infos for f in info.topologies
        )
        self.hardware_files: tuple[Traversable | Path, ...] = tuple(
            f for info in self.infos for f in info.hardware
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each plugin that failed, and for each conflict between two that did not."""
        failed = [info for info in self.infos if info.status == "failed"]
        lines = (f"plugin {info} is not loaded: {info.cause}" for info in failed)
        return (*lines, *(str(contest) for contest in self.registry.contests))

    def manifest(self) -> tuple[str, ...]:
        """A line for each registered component, sorted: what processes of one run must agree on."""
        rows = (
            json.dumps([part.slot, part.kind, part.revision, info.distribution, info.version])
            for info in self.infos
            for part in info.components
        )
        return tuple(sorted(rows))

    def digest(self) -> str:
        """SHA-256 of the manifest, in hexadecimal; no order of loading changes it."""
        return hashlib.sha256("\n".join(self.manifest()).encode()).hexdigest()


def load_plugins(
    *,
    blocked: Iterable[str] = (),
    allowed: Iterable[str] | None = None,
    strict: bool = False,
    entry_points: Iterable[EntryPoint] | None = None,
) -> Plugins:
    """Loads the installed plugins, or those of `entry_points`; a blocked or not allowed one is not imported.

    Names are those of entry points or of distributions. Raises PluginError for a name that is neither;
    with `strict` also for anything that is wrong with any plugin, all told at once.
    """
    with _alone():
        candidates = discovery.find(entry_points)
        blocked_for = discovery.select(
            candidates, tuple(blocked), None if allowed is None else tuple(allowed)
        )
        plugins = Plugins(_load(candidate, blocked_for.get(candidate)) for candidate in candidates)
    if strict and plugins.problems:
        raise PluginError(*plugins.problems)
    for line in plugins.problems:
        logger.warning("%s", line)
    return plugins


class _Refused(Exception):
    """Why one plugin is not registered, in one line."""


def _load(candidate: Candidate, blocked_for: str | None) -> PluginInfo:
    info = PluginInfo(
        name=candidate.name,
        distribution=candidate.distribution,
        version=candidate.version,
        origin=candidate.value,
        status="blocked" if blocked_for else "failed",
        cause=blocked_for or candidate.refusal,
        requires=candidate.requires,
    )
    if info.cause is not None or candidate.entry_point is None:
        return info
    try:
        with _during("its import"):
            plugin = candidate.entry_point.load()
        hooks = _hooks(plugin)
        components = _call(hooks, "compose_components", vetting.components_refusal)
        dialects = _call(hooks, "compose_dialects", vetting.files_refusal)
        specs = _call(hooks, "compose_specs", vetting.files_refusal)
        topologies = _call(hooks, "compose_topologies", vetting.files_refusal)
        hardware = _call(hooks, "compose_hardware", vetting.files_refusal)
    except _Refused as refused:
        logger.debug("plugin %s", info, exc_info=refused)
        return attrs.evolve(info, cause=str(refused))
    origin = getattr(sys.modules.get(candidate.entry_point.module), "__file__", None) or candidate.value
    return attrs.evolve(
        info,
        origin=origin,
        status="loaded",
        components=components,
        dialects=dialects,
        specs=specs,
        topologies=topologies,
        hardware=hardware,
    )


@contextmanager
def _during(what: str) -> Iterator[None]:
    """Turns whatever a plugin raises into one line; only an interrupt is the user's. What it prints is no output."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (KeyboardInterrupt, _Refused):
        raise
    except BaseException as error:
        raise _Refused(f"{what} raised {_told(error)}") from error


def _told(error: BaseException) -> str:
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "(its message can not be shown)"
    message = message if len(message) <= 300 else message[:297] + "..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _hooks(plugin: Any) -> dict[str, pluggy.HookCaller]:
    """The hooks that a plugin implements, by name, checked against their specs."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        with _during("its registration"):
            manager.register(plugin)
            callers = manager.get_hookcallers(plugin) or []
            unmarked = [name for name in HOOKS if _is_unmarked(plugin, name)]
    except _Refused as refused:
        # pluggy tells plugin, signature and arguments on lines of their own.
        if isinstance(refused.__cause__, pluggy.PluginValidationError):
            lines = str(refused.__cause__).splitlines()[1:]
            told = ": ".join(line.removeprefix("hookimpl definition: ") for line in lines)
            raise _Refused(f"its hook is refused: {told}") from refused.__cause__
        raise
    if unmarked:
        raise _Refused(f"{unmarked[0]} is not marked with @hookimpl")
    for caller in callers:
        for implementation in caller.get_hookimpls():
            if not caller.has_spec() and not implementation.optionalhook:
                near = nearest(caller.name, HOOKS)
                hint = "" if near is None else f"; did you mean {near!r}?"
                raise _Refused(f"unknown hook {caller.name!r}; hooks: {one_of(HOOKS)}{hint}")
            if implementation.wrapper or implementation.hookwrapper:
                raise _Refused(f"{caller.name} is a wrapper, but a hook is called for one plugin alone")
    if not callers:
        raise _Refused(f"it implements no hook; hooks: {one_of(HOOKS)}")
    return {caller.name: caller for caller in callers}


def _is_unmarked(plugin: Any, name: str) -> bool:
    found = getattr(plugin, name, None)
    return callable(found) and not hasattr(found, f"{hookspecs.PROJECT}_impl")


def _call(hooks: dict[str, pluggy.HookCaller], name: str, refusal: Any) -> tuple[Any, ...]:
    """What one plugin gives for one hook: all of it, or _Refused."""
    if name not in hooks:
        return ()
    with _during(name):
        returned = hooks[name]()
        if len(returned) < len(hooks[name].get_hookimpls()):
            raise _Refused(f"{name} returned None instead of an iterable")
        for each in returned:
            if not isinstance(each, Iterable) or isinstance(each, str | bytes):
                raise _Refused(f"{name} returned {type(each).__name__} instead of an iterable")
        items = tuple(item for each in returned for item in each)
        reason = refusal(items)
    if reason is not None:
        raise _Refused(f"{name}: {' '.join(reason.split())}")
    return items


@attrs.frozen
class Selection:
    """Which plugins a process loads, as `configure` takes it; `allowed` None: all that are installed."""

    blocked: tuple[str, ...] = ()
    allowed: tuple[str, ...] | None = None
    strict: bool = False


ASKED_WHILE_LOADING = "a plugin asks for the plugins while they are being loaded"

_lock = RLock()
_loading = False
_settings = Selection()
_current: Plugins | None = None


@contextmanager
def _alone() -> Iterator[None]:
    """One load at a time, and none from within a plugin that is being loaded."""
    global _loading
    with _lock:
        if _loading:
            raise PluginError(ASKED_WHILE_LOADING)
        _loading = True
        try:
            yield
        finally:
            _loading = False


def configure(
    *, blocked: Iterable[str] = (), allowed: Iterable[str] | None = None, strict: bool = False
) -> None:
    """Says what `current` loads in this process from now on; `allowed` takes the place of COMPOSE_PLUGINS."""
    global _settings, _current
    with _lock:
        _settings = Selection(tuple(blocked), None if allowed is None else tuple(allowed), strict)
        _current = None


def selection() -> Selection:
    """What `current` loads in this process: as configured, or as COMPOSE_PLUGINS says."""
    with _lock:
        return attrs.evolve(_settings, allowed=_allowed())


def current() -> Plugins:
    """The plugins of this process, loaded at the first call.

    The environment variable COMPOSE_PLUGINS lists those to load, separated by commas; unset or empty
    means all that are installed. Raises PluginError as `load_plugins` does, and when a plugin asks
    while it is loaded itself.
    """
    global _current
    with _lock:
        if _loading:
            # Also where a load came before: what a plugin finds must not depend on the order of loads.
            raise PluginError(ASKED_WHILE_LOADING)
        if _current is None:
            blocked, strict = _settings.blocked, _settings.strict
            _current = load_plugins(blocked=blocked, allowed=_allowed(), strict=strict)
        return _current


def _allowed() -> tuple[str, ...] | None:
    if _settings.allowed is not None:
        return _settings.allowed
    names = tuple(name.strip() for name in os.environ.get("COMPOSE_PLUGINS", "").split(",") if name.strip())
    return names or None
