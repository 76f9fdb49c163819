"""Real small distributions, written to a folder that comes first on the path.

A distribution `composeformer` without entry points hides the installed one, so that only the plugins
of a test exist.
"""

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import pytest

OUR_VERSION = "1.2.0"
HEADER = """
from pathlib import Path
import attrs
from composeformer.config import Config, config, field, part
from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl

@config
class Size(Config):
    size: int = field(default=4, minimum=1)
    ratios: tuple[float, ...] = field(default=(1.0,), minimum=0)
    norm: object = part("norm")

def component(kind, slot="ffn", config=Size, **more):
    more.setdefault("implementations", (Implementation("reference", "never.imported:Module"),))
    return Component(slot=slot, kind=kind, config=config, **more)
"""


class Site:
    """A folder of modules, and one of the distributions that they are installed as."""

    def __init__(self, folder: Path, metadata: Path) -> None:
        self.folder = folder
        self.metadata = metadata
        self.modules: list[str] = []

    def distribution(
        self, name: str, entry_points: str, version: str = "1.0", requires: Iterable[str] = ()
    ) -> None:
        info = self.metadata / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
        (info / "RECORD").write_text("")
        if entry_points:
            (info / "entry_points.txt").write_text(entry_points)

    def add(
        self, name: str, body: str, distribution: str = "", version: str = "1.0", requires: Iterable[str] = ()
    ) -> str:
        """Installs a plugin of one module as `NAME-dist`; gives back the module's name."""
        module = f"{name}_of_{self.folder.name.replace('-', '_')}"
        (self.folder / f"{module}.py").write_text(HEADER + body)
        self.modules.append(module)
        points = f"[composeformer]\n{name} = {module}\n"
        self.distribution(distribution or f"{name}-dist", points, version, requires)
        return module

    def entry_points(self) -> dict[str, EntryPoint]:
        """What is installed here, by name."""
        found = distributions(path=[str(self.metadata)])
        return {point.name: point for owner in found for point in owner.entry_points}

    @staticmethod
    def components(*calls: str) -> str:
        """The source of a plugin that registers these: `components('"a"', '"b", slot="norm"')`."""
        yields = "".join(f"    yield component({call})\n" for call in calls)
        return f"@hookimpl\ndef compose_components():\n{yields}"

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a new process that sees this folder first."""
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def enter(folder: Path, metadata: Path) -> Iterator[Site]:
    folder.mkdir()
    metadata.mkdir(exist_ok=True)
    site = Site(folder, metadata)
    site.distribution("composeformer", "", OUR_VERSION)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield site
    finally:
        sys.path.remove(str(folder))
        for module in site.modules:
            sys.modules.pop(module, None)
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A folder that comes first on the path; what is added is installed."""
    folder = tmp_path / "".join(c if c.isalnum() else "_" for c in tmp_path.name)
    yield from enter(folder, folder)


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for a whole module: its modules can be imported, its distributions are not on the path."""
    folder = tmp_path_factory.mktemp("shared")
    yield from enter(folder / "shared_site", folder / "metadata")
