"""What a plugin can hook into: every function here is one hook, and a plugin implements those it needs.

```python
from composeformer.hookspecs import hookimpl

@hookimpl
def compose_components():
    reference = Implementation("reference", "mine.module:Mine")
    yield Component(slot="ffn", kind="mine", config=Mine, implementations=(reference,))
```

Each hook is called for each plugin alone, so what a plugin returns is known to be its own. A plugin
that raises, also half way through a generator, contributes nothing to any hook.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from composeformer.contracts import Component

PROJECT = "composeformer"
# The version of these hooks and of the modules that plugins may use: the first two numbers of composeformer's own.
API_VERSION = "0.1"
# What a plugin of that version requires of composeformer.
API_RANGE = ">=0.1,<0.2"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def compose_components() -> Iterable["Component"]:
    """The ways to fill a slot that this plugin brings.

    When: once for each plugin, right after its import, when the plugins of a process are first needed.
    It must not import torch: implementations are named by strings and imported when a model is built.
    Order: composeformer's own plugins first, then the others by name; no order decides between plugins
    that register the same slot and kind, that is an error until one of them is blocked.
    Returns: an iterable of `Component`; a generator will do. All are registered, or none.
    """
    return ()


@hookspec
def compose_dialects() -> Iterable["Traversable | Path"]:
    """The foreign model families, and forms of stored weights, that this plugin can read and write.

    When: once for each plugin, after its `compose_components`. The files are found, not read.
    Order: composeformer's own plugins first, then the others by name.
    Returns: an iterable of existing `.toml` files, one for each family or coding, as paths or as
    `importlib.resources.files("package") / "name.toml"`.
    """
    return ()


@hookspec
def compose_specs() -> Iterable["Traversable | Path"]:
    """The specs that this plugin ships, which a user names without their path and suffix.

    When: once for each plugin, after its `compose_dialects`. The files are found, not read.
    Order: composeformer's shipped specs are looked up before these; then composeformer's own plugins,
    then the others by name.
    Returns: an iterable of existing `.toml` files, as paths or as
    `importlib.resources.files("package") / "name.toml"`.
    """
    return ()


@hookspec
def compose_topologies() -> Iterable["Traversable | Path"]:
    """The profiles of clusters that this plugin ships: links with their bandwidths and latencies, and sources.

    When: once for each plugin, after its `compose_specs`. The files are found, not read;
    `composeformer.costs.topology` reads them.
    Order: composeformer's own plugins first, then the others by name; a name that two plugins ship is an
    error for who asks for it.
    Returns: an iterable of existing `.toml` files, one for each topology, as paths or as
    `importlib.resources.files("package") / "name.toml"`.
    """
    return ()


@hookspec
def compose_hardware() -> Iterable["Traversable | Path"]:
    """The profiles of devices that this plugin ships: peaks, memory, bandwidths and power, and sources.

    When: once for each plugin, after its `compose_topologies`. The files are found, not read;
    `composeformer.costs.hardware` reads them.
    Order: composeformer's own plugins first, then the others by name; a name that two ship is an error for who
    asks for it.
    Returns: an iterable of existing `.toml` files, one for each device, as paths or as
    `importlib.resources.files("package") / "name.toml"`.
    """
    return ()
