"""What laws are tried on: a component of a plugin, computed by one of its implementations."""

from collections.abc import Iterator

import attrs

from composeformer.contracts import Component, Implementation
from composeformer.discovery import BUILTIN
from composeformer.errors import InputError, nearest, one_of
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry


@attrs.frozen(eq=False, kw_only=True)
class Subject:
    """A component under test. `pool` is what the parts around it are of: its own plugin's, and the built-in ones."""

    component: Component
    implementation: Implementation
    registry: Registry
    pool: tuple[Component, ...]

    @property
    def slot(self) -> str:
        return self.component.slot

    @property
    def kind(self) -> str:
        return self.component.kind

    def of_slot(self, slot: str) -> tuple[Component, ...]:
        """What may fill a slot beside the component."""
        return tuple(each for each in self.pool if each.slot == slot)

    def __str__(self) -> str:
        return f"{self.slot} {self.kind} ({self.implementation.name})"


def subject(
    slot: str, kind: str, implementation: str = "reference", registry: Registry | None = None
) -> Subject:
    """The subject of that name. Raises ComposeError where there is none."""
    registry = current().registry if registry is None else registry
    component = registry.get(slot, kind)
    found = {each.name: each for each in component.implementations}
    if implementation not in found:
        raise InputError(f"{slot} {kind} has no implementation {implementation!r}; it has: {one_of(found)}")
    return Subject(
        component=component,
        implementation=found[implementation],
        registry=registry,
        pool=_pool(registry, registry.owner(component)),
    )


def subjects(plugin: str | None = None, registry: Registry | None = None) -> Iterator[Subject]:
    """Every component of a plugin in all its implementations, or of all plugins.

    A plugin is named as it is listed, or by its distribution. Raises InputError for one that is not loaded.
    """
    registry = current().registry if registry is None else registry
    for info in plugins_named(plugin, registry):
        for component in info.components:
            for implementation in registry.get(component.slot, component.kind).implementations:
                yield subject(component.slot, component.kind, implementation.name, registry)


def plugins_named(plugin: str | None = None, registry: Registry | None = None) -> list[PluginInfo]:
    """The plugins of that name or distribution, or all. Raises InputError for one that is not loaded."""
    registry = current().registry if registry is None else registry
    if plugin is None:
        return [info for info in registry.infos if info.status == "loaded"]
    found = [info for info in registry.infos if plugin in (info.name, info.distribution, info.selector)]
    if not found:
        names = sorted({name for info in registry.infos for name in (info.name, info.distribution)})
        near = nearest(plugin, names)
        hint = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"{plugin}: no plugin has this name; installed: {one_of(names)}{hint}")
    for info in found:
        if info.status != "loaded":
            raise InputError(f"plugin {info} is {info.status}: {info.cause}")
    return found


def _pool(registry: Registry, owner: PluginInfo) -> tuple[Component, ...]:
    """Its own plugin's components first: what is built to go together is tried together."""
    builtin = [info for info in registry.infos if info.distribution == BUILTIN and info is not owner]
    have = set(map(id, registry))
    return tuple(each for info in (owner, *builtin) for each in info.components if id(each) in have)
