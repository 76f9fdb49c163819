"""What of the plugin API is to go: it works for one minor version more, and says so where it is used.

Who takes something away adds it to `DEPRECATED` and calls `deprecated` in what stays of it; docs/plugin_api.md lists
it. A hook says so to pluggy: `@hookspec(warn_on_impl=warning(name))`.
"""

import warnings
from collections.abc import Mapping

import attrs


@attrs.frozen
class Deprecation:
    """Deprecated in the API version `since` and in all releases of it, `gone` with the next or a later one."""

    since: str
    gone: str
    instead: str


# By the name that a plugin's author reads: `composeformer.module.name`, or a hook's.
DEPRECATED: Mapping[str, Deprecation] = {}


def warning(name: str) -> DeprecationWarning:
    """The warning of something that is deprecated. Raises KeyError for what is not."""
    one = DEPRECATED[name]
    told = f"{name} is deprecated since version {one.since} of the plugin API and gone in {one.gone}: {one.instead}"
    return DeprecationWarning(told)


def deprecated(name: str) -> None:
    """Warns whoever called the caller."""
    warnings.warn(warning(name), stacklevel=3)
