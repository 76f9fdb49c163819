"""The one door from the description plane to the tensor plane: an object by its dotted name, imported when asked for.

import-linter counts imports inside functions too, so the wall between the planes is crossed only by strings
that plugins registered, or that this package wrote itself; never by anything a spec says.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def load(name: str) -> Any:
    """`package.module:attribute` as an object. Raises ImportError or AttributeError as Python does."""
    module, _, attribute = name.partition(":")
    found: Any = import_module(module)
    for part in attribute.split(".") if attribute else ():
        found = getattr(found, part)
    return found


def available(package: str) -> bool:
    """Whether a top-level package is installed, without importing it."""
    return find_spec(package) is not None
