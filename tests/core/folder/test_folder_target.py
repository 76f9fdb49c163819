"""Which folders may be written, which may be replaced, and what a user is told otherwise."""

import os
from pathlib import Path

import pytest

from composeformer.errors import FolderError
from composeformer.folder import new_folder, write_text


def write(target: Path, *, replace: bool = False) -> None:
    with new_folder(target, replace=replace) as folder:
        write_text(folder / "spec.toml", "new = true\n")


def refused(target: Path, *, replace: bool) -> str:
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    with pytest.raises(FolderError) as error:
        write(target, replace=replace)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert len(error.value.lines) == 1
    assert str(target) in str(error.value)
    return str(error.value)


def test_missing_parents_are_made_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert (tmp_path / "a" / "b" / "spec.toml").read_text() == "new = true\n"
    assert (tmp_path / "empty" / "spec.toml").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_a_full_folder_is_kept_unless_it_is_a_model_to_replace(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "not empty" in refused(tmp_path, replace=False)
    write(tmp_path, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


@pytest.mark.parametrize("name", ["thesis.tex", "config.json/x", "model.safetensors"])
def test_what_does_not_look_like_a_model_is_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work")
    assert "no model folder" in refused(tmp_path, replace=True)


def test_a_repository_and_the_current_folder_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spec.toml").write_text("")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert "current folder" in refused(tmp_path, replace=True)
    monkeypatch.chdir("/")
    (tmp_path / ".git").mkdir()
    assert ".git" in refused(tmp_path, replace=True)


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file", replace=True)
    assert "can not be written" in refused(tmp_path / "file" / "below", replace=True)
    assert (tmp_path / "file").read_text() == "x"


def test_a_linked_target_is_replaced_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "spec.toml").write_text("")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", replace=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "spec.toml").read_text() == "new = true\n"


def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write(tmp_path / "target")
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_read_only_parent_gives_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        # A superuser is not stopped by modes: the system's answer is given in its place.
        def refuse(path: str, mode: int = 0o777) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "mkdir", refuse)
    try:
        message = refused(tmp_path / "target", replace=False)
    finally:
        tmp_path.chmod(0o755)
    assert "can not be written" in message
    assert "Permission denied" in message
    assert list(tmp_path.iterdir()) == []
