"""A data worker has its parent's registry, however it is started, or the run ends with what differs."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from composeformer import plugins
from composeformer.errors import PluginError
from composeformer.train import WorkerDiffers, worker_init

PLUGIN = """
from composeformer.config import Config, config
from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl

@config
class Nothing(Config):
    pass

@hookimpl
def compose_components():
    for kind in ("first", "second"):
        yield Component("ffn", kind, Nothing, (Implementation("reference", "never.imported:Module"),))
"""
# What runs in a worker that is spawned has to be imported there.
PROBE = """
from composeformer import plugins

class Digests:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return plugins.current().digest()

def refuse(worker):
    raise RuntimeError(f"worker {worker} of two")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, where a worker finds what it runs."""
    (tmp_path / "data_worker_probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("data_worker_probe", None)
    plugins.configure()


def distribution(folder: Path) -> Path:
    """A plugin in a folder of its own, as installed."""
    site = folder / "site"
    info = site / "data_worker_parts-1.5.dist-info"
    info.mkdir(parents=True)
    (site / "data_worker_parts.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: data-worker-parts\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[composeformer]\nparts = data_worker_parts\n")
    return site


def digests(context: str, init: Callable[[int], None]) -> list[str]:
    """What two samples made by a worker say of its registry."""
    import data_worker_probe

    loader: Any = DataLoader(
        data_worker_probe.Digests(),
        batch_size=None,
        num_workers=1,
        multiprocessing_context=context,
        worker_init_fn=init,
        timeout=60,
    )
    return list(loader)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_has_what_was_configured_in_its_parent(folder: Path, context: str) -> None:
    everything = plugins.current().digest()
    plugins.configure(blocked=["fp8"])
    mine = plugins.current().digest()
    assert mine != everything
    assert digests(context, worker_init()) == [mine, mine]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_what_a_worker_lacks_ends_the_run_with_a_line_for_each(
    folder: Path, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as visible:
        visible.syspath_prepend(str(distribution(folder)))
        plugins.configure()
        init = worker_init()
    # Gone from the path: who loads plugins from now on finds no more of it.
    plugins.configure()
    with pytest.raises(WorkerDiffers) as caught:
        digests(context, init)
    lacks = "data worker 0 lacks the ffn {} of data-worker-parts 1.5, revision 1"
    assert caught.value.lines == (lacks.format("first"), lacks.format("second"))


def test_what_a_worker_has_besides_or_can_not_load_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = worker_init()
    site = distribution(folder)
    monkeypatch.syspath_prepend(str(site))
    plugins.configure()
    with pytest.raises(WorkerDiffers) as caught:
        init(3)
    besides = "data worker 3 has besides the ffn {} of data-worker-parts 1.5, revision 1"
    assert caught.value.lines == (besides.format("first"), besides.format("second"))

    init = worker_init()
    (site / "data_worker_parts.py").write_text("raise OSError('no such table')")
    sys.modules.pop("data_worker_parts")
    plugins.configure()
    with pytest.raises(WorkerDiffers) as caught:
        init(3)
    assert caught.value.lines[-1] == (
        "data worker 3: plugin parts (data-worker-parts 1.5) is not loaded: its import raised OSError: no such table"
    )
    assert len(caught.value.lines) == 3


def test_a_selection_that_a_worker_can_not_make_is_told_as_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as visible:
        visible.syspath_prepend(str(distribution(folder)))
        plugins.configure(blocked=["data-worker-parts"])
        init = worker_init()
    plugins.configure()
    with pytest.raises(WorkerDiffers) as caught:
        init(1)
    (line,) = caught.value.lines
    assert line.startswith("data worker 1: --no-plugin data-worker-parts: no such plugin; ")


def test_a_variable_that_chose_plugins_in_the_parent_chooses_them_in_a_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as chosen:
        chosen.setenv("COMPOSE_PLUGINS", "dense,training")
        plugins.configure()
        mine = plugins.current().digest()
        init = worker_init()
    assert digests("fork", init) == [mine, mine]


def test_a_forked_worker_keeps_the_parts_that_it_was_forked_with() -> None:
    init, before = worker_init(), plugins.current()
    init(0)
    assert plugins.current() is before


def test_a_function_of_the_users_own_is_called_last(folder: Path) -> None:
    import data_worker_probe

    with pytest.raises(RuntimeError, match="worker 0 of two"):
        digests("fork", worker_init(data_worker_probe.refuse))


def test_an_error_of_several_lines_keeps_them() -> None:
    error = WorkerDiffers("data worker 0 lacks this", "data worker 0 lacks that")
    assert isinstance(error, PluginError)
    assert error.lines == ("data worker 0 lacks this", "data worker 0 lacks that")
