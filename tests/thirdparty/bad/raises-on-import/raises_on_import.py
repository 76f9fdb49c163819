"""Imports what is not there."""

import a_library_that_nobody_has  # noqa: F401

from composeformer.hookspecs import hookimpl


@hookimpl
def compose_components():
    return ()
