"""Whatever happens while a folder is written, its place holds the complete old content or the complete new.

Every call that changes the disk is a point of failure: a forked child counts them through audit hooks, and at
the n-th is killed with SIGKILL, or is told that the disk is full; n runs until the child finishes untouched.
"""

import builtins
import errno
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from composeformer.errors import FolderError
from composeformer.folder import new_folder, swap, write_json, write_manifest, write_shards, write_text

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

UNTOUCHED, STRUCK, REFUSED, BROKEN = 0, 10, 11, 12
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def fill(folder: Path, value: int) -> None:
    state = {f"t{place}": torch.full((4,), value, dtype=torch.uint8) for place in range(3)}
    write_shards(folder, state.items(), max_shard_bytes=8)
    write_json(folder / "config.json", {"value": value})
    write_text(folder / "spec.toml", f"value = {value}\n")
    write_manifest(folder)


def contents(folder: Path) -> dict[str, bytes] | None:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


def write(
    target: Path, value: int, *, replace: bool = False, then: Callable[[], object] = lambda: None
) -> None:
    with new_folder(target, replace=replace) as folder:
        fill(folder, value)
        then()


def complete(place: Path, value: int) -> dict[str, bytes]:
    write(place, value)
    found = contents(place)
    assert found is not None
    assert len(found) == 6
    return found


class Faults:
    """Strikes this process at its n-th change of the disk: with a signal, or with "no space left"."""

    def __init__(self, place: int, kill: bool) -> None:
        self.left, self.kill = place, kill

    def arm(self) -> None:
        fsync, opened, faults = os.fsync, builtins.open, self

        class Slow:
            """A file that is struck in the middle of a write."""

            def __init__(self, file: Any) -> None:
                self.file = file

            def __enter__(self) -> "Slow":
                return self

            def __exit__(self, *error: object) -> None:
                self.file.close()

            def write(self, data: bytes) -> None:
                half = len(data) // 2
                self.file.write(data[:half])
                self.file.flush()
                faults.strike()
                self.file.write(data[half:])

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
                self.strike()

        def slow(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            file = opened(path, mode, *rest, **more)
            return Slow(file) if mode == "xb" else file

        def flush(descriptor: int) -> None:
            self.strike()
            fsync(descriptor)

        builtins.open = slow  # type: ignore[assignment]
        os.fsync = flush  # type: ignore[assignment]
        sys.addaudithook(hook)

    def strike(self) -> None:
        self.left -= 1
        if self.left == 0:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(job: Callable[[], None], faults: Faults) -> int:
    child = os.fork()
    if child == 0:
        code = BROKEN
        try:
            torch.set_num_threads(1)
            faults.arm()
            job()
            code = UNTOUCHED if faults.left > 0 else STRUCK
        except FolderError as error:
            code = REFUSED if len(error.lines) == 1 and "\n" not in str(error) else BROKEN
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "disk full"])
@pytest.mark.parametrize("way", ["fresh", "exchange", "aside"])
def test_a_fault_at_any_change_leaves_old_or_new_whole(
    tmp_path: Path, way: str, kill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = complete(tmp_path / "other" / "target", 2)
    old = complete(tmp_path / "pattern" / "target", 1) if way != "fresh" else None
    if way == "aside":
        monkeypatch.setattr(swap, "exchange", lambda one, other: False)
    outcomes = set()
    for place in range(1, 200):
        home = tmp_path / f"{place}"
        home.mkdir()
        target = home / "target"
        if old is not None:
            shutil.copytree(tmp_path / "pattern" / "target", target)
        code = run(partial(write, target, 2, replace=True), Faults(place, kill))
        assert code in ((UNTOUCHED, -signal.SIGKILL) if kill else (UNTOUCHED, STRUCK, REFUSED))
        swap.recover(target)
        found = contents(target)
        assert found in (old, new), f"fault {place}: {sorted(found or ())}"
        if code in (STRUCK, UNTOUCHED):
            assert found == new
        if code == REFUSED:
            assert {path.name for path in home.iterdir()} <= {"target"}
        outcomes.add((code, found == new))
        if code == UNTOUCHED:
            break
        # The next writer finds a clean place, and leaves one.
        with new_folder(target, replace=True) as folder:
            write_text(folder / "spec.toml", "")
        assert [path.name for path in home.iterdir()] == ["target"]
    assert code == UNTOUCHED
    assert place > 20
    assert (-signal.SIGKILL if kill else REFUSED, False) in outcomes


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, bool]] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "target").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    with new_folder(tmp_path / "target") as folder:
        fill(folder, 1)
        (folder / "sub").mkdir()
        write_text(folder / "sub" / "x", "x")
    written = [tmp_path / "target", *(tmp_path / "target").rglob("*")]
    assert len(written) == 9
    assert {path.stat().st_ino for path in written} <= {node for node, exists in flushed if not exists}
    assert flushed[-1] == (tmp_path.stat().st_ino, True)


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write(tmp_path / "target", 1, then=partial(fail, error))
        assert list(tmp_path.iterdir()) == []


def test_an_interrupt_between_the_two_renames_brings_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    old = complete(target, 1)
    monkeypatch.setattr(swap, "exchange", lambda one, other: False)
    rename, calls = os.rename, 0

    def interrupted(one: Path, other: Path) -> None:
        nonlocal calls
        rename(one, other)
        calls += "previous" in str(other)
        if "previous" in str(other):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(target, 2, replace=True, then=partial(monkeypatch.setattr, os, "rename", interrupted))
    assert calls == 1
    assert contents(target) == old
    assert list(tmp_path.iterdir()) == [target]


def test_a_living_writer_keeps_its_folder_and_a_dead_one_does_not(tmp_path: Path) -> None:
    target = tmp_path / "target"
    dead = tmp_path / ".target.incomplete-00c0ffee"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"x")
    unrelated = [tmp_path / ".target.incomplete-notours", tmp_path / ".other.incomplete-00c0ffee"]
    for path in unrelated:
        path.mkdir()
    lived: list[bool] = []
    with new_folder(target, replace=True) as first:
        assert not dead.exists()
        fill(first, 1)
        write(target, 2, replace=True, then=lambda: lived.append(first.exists()))
        assert (target / "spec.toml").read_text() == "value = 2\n"
    assert lived == [True]
    assert (target / "spec.toml").read_text() == "value = 1\n"
    assert sorted(tmp_path.iterdir()) == sorted([target, *unrelated])


def test_without_locks_folders_are_written_but_never_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, flags: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    unknown = tmp_path / ".target.incomplete-00c0ffee"
    unknown.mkdir()
    complete(tmp_path / "target", 1)
    assert unknown.is_dir()


def test_two_new_folders_of_one_name_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="not empty"):
        write(tmp_path / "target", 1, then=partial(complete, tmp_path / "target", 2))
    assert (tmp_path / "target" / "spec.toml").read_text() == "value = 2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
