"""Ships dialects alone."""

from collections.abc import Iterable
from pathlib import Path

from composeformer.hookspecs import hookimpl


@hookimpl
def compose_dialects() -> Iterable[Path]:
    return [Path(__file__).with_name(f"{name}.toml") for name in ("astray", "stranger")]
