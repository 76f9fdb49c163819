"""composeformer: a TOML spec becomes a working, efficient language model, every part of it a plugin.

`import composeformer as cf`; then `cf.build`, `cf.load`, `cf.generate`, `cf.cost` and the others of `__all__`.
Nothing is imported until it is used, so that describing a model costs no import of torch.
"""

TYPE_CHECKING = False  # as typing's; importing typing costs what `compose --help` has no time for

if TYPE_CHECKING:
    from typing import Any

    from composeformer.assemble import build
    from composeformer.costs import checkpoint, cost
    from composeformer.errors import ComposeError
    from composeformer.generation import Sampling
    from composeformer.spec import Spec
    from composeformer.store import export_model, generate, import_model, load, save, verify

_HOMES = {
    "build": "composeformer.assemble",
    "checkpoint": "composeformer.costs",
    "cost": "composeformer.costs",
    "ComposeError": "composeformer.errors",
    "Sampling": "composeformer.generation",
    "Spec": "composeformer.spec",
    "export_model": "composeformer.store",
    "generate": "composeformer.store",
    "import_model": "composeformer.store",
    "load": "composeformer.store",
    "save": "composeformer.store",
    "verify": "composeformer.store",
}

__all__ = [
    "ComposeError",
    "Sampling",
    "Spec",
    "__version__",
    "build",
    "checkpoint",
    "cost",
    "export_model",
    "generate",
    "import_model",
    "load",
    "save",
    "verify",
]


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("composeformer")
        except PackageNotFoundError:
            return "0+unknown"
    if name in _HOMES:
        from composeformer import lazy

        found = lazy.load(f"{_HOMES[name]}:{name}")
        globals()[name] = found
        return found
    raise AttributeError(f"module 'composeformer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
