"""Draws that hang on the seed alone.

Hypothesis tries, now and then, constants that it reads in whatever modules of the user's are imported, so a seed would
draw other cases in a suite than in `compose plugins check`, and others again once a module is edited.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

_entered = 0
_lock = Lock()
_kept: tuple[Any, Any] | None = None


@contextmanager
def steady() -> Iterator[None]:
    """Within, hypothesis knows no constants but its own. A release of hypothesis that keeps them elsewhere draws as it
    does. May be entered again, and by several threads.
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(by: int) -> None:
    """The first that enters takes the constants away, the last that leaves puts them back."""
    global _entered, _kept
    try:
        from hypothesis.internal.conjecture import providers
    except ImportError:
        return
    module: Any = providers
    if not hasattr(module, "_get_local_constants") or not hasattr(module, "CONSTANTS_CACHE"):
        return
    with _lock:
        before, _entered = _entered, _entered + by
        if before == 0:
            _kept = module._get_local_constants, module.CONSTANTS_CACHE
            none = type(module.GLOBAL_CONSTANTS)()
            module._get_local_constants = lambda: none
            module.CONSTANTS_CACHE = type(module.CONSTANTS_CACHE)(module.CONSTANTS_CACHE.max_size)
        elif _entered == 0 and _kept is not None:
            module._get_local_constants, module.CONSTANTS_CACHE = _kept
            _kept = None
