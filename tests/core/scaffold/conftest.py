"""A folder of freshly written plugins, one of each slot, as they stand where they were installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from composeformer.scaffold import STARTS, Created, create

ROOT = Path(__file__).resolve().parents[3]


class Site:
    """The written plugins, and processes that see them as installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.created: dict[str, Created] = {}

    def add(self, name: str, slot: str) -> Created:
        """Writes a plugin, and beside it the metadata that installing it would write."""
        made = create(name, slot, self.folder / name)
        self.created[slot] = made
        project = tomli.loads((made.folder / "pyproject.toml").read_text())["project"]
        info = made.folder / f"{made.names.package}-{project['version']}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
        lines += [f"Requires-Dist: {line}" for line in project["dependencies"]]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        points = project["entry-points"]["composeformer"]
        text = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[composeformer]\n{text}")
        return made

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(str(made.folder) for made in self.created.values())
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True
        )


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("written"))
    for slot in STARTS:
        site.add(f"my-{slot}", slot)
    return site
