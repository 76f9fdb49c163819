"""A hook of a name that nobody calls."""

from composeformer.hookspecs import hookimpl


@hookimpl
def compose_componets():
    return ()
