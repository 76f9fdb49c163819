"""Draws that hang on the seed alone.

Hypothesis tries, now and then, constants that it reads in whatever modules of the user's are imported, so a seed would
draw other cases in a suite than in `compose plugins check`, and others again once a module is edited.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def steady() -> Iterator[None]:
    """Within, hypothesis knows no constants but its own. A release of hypothesis that keeps them elsewhere draws as it
    does.
    """
    try:
        from hypothesis.internal.conjecture import providers
    except ImportError:
        yield
        return
    module: Any = providers
    if not hasattr(module, "_get_local_constants") or not hasattr(module, "CONSTANTS_CACHE"):
        yield
        return
    before = module._get_local_constants, module.CONSTANTS_CACHE
    none = type(module.GLOBAL_CONSTANTS)()
    module._get_local_constants = lambda: none
    module.CONSTANTS_CACHE = type(before[1])(before[1].max_size)
    try:
        yield
    finally:
        module._get_local_constants, module.CONSTANTS_CACHE = before
