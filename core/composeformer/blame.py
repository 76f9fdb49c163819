"""Whose mistake it is: what a part's own code raises is told with its plugin, its kind and its place.

Without this a misspelt name in somebody's plugin would look like an error of the framework, or of the spec.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from composeformer.contracts import Component, Part
from composeformer.errors import ComposeError, PluginError
from composeformer.registry import Registry


@contextmanager
def blame(registry: Registry, part: Part | Component, path: str, what: str) -> Iterator[None]:
    """Turns any exception but a ComposeError into one PluginError: `what` of `part` at `path` raised it. A SystemExit
    is no exception to that: a part has no say in how a run ends.
    """
    try:
        yield
    except ComposeError:
        raise
    except (Exception, SystemExit) as error:
        told = " ".join(str(error).split())[:400]
        cause = f"{type(error).__name__}: {told}" if told else type(error).__name__
        raise PluginError(f"{described(registry, part, path)}: {what}: {cause}") from error


def described(registry: Registry, part: Part | Component, path: str) -> str:
    """`plugin dense (composeformer 0.1.0): mixer gqa at layers.0.mixer`; of a codec there is no part."""
    owner = registry.find_owner(part.component if isinstance(part, Part) else part)
    return f"{f'plugin {owner}: ' if owner is not None else ''}{part.slot} {part.kind} at {path}"
