"""A manifest finds every change of every file, and says what happened to it."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.errors import FolderError
from composeformer.folder import (
    check_manifest,
    new_folder,
    write_json,
    write_manifest,
    write_shards,
    write_text,
)

FILES = ["config.json", "manifest.json", "model.safetensors", "spec.toml", "tokenizer.json"]


def model(place: Path) -> Path:
    with new_folder(place) as folder:
        write_shards(folder, [("a", torch.arange(4.0)), ("b", torch.ones(3, dtype=torch.bfloat16))])
        write_json(folder / "config.json", {"model_type": "tiny"})
        write_text(folder / "spec.toml", 'name = "tiny"\n')
        write_text(folder / "tokenizer.json", "{}\n")
        write_manifest(folder)
    return place


@pytest.fixture(scope="module")
def written() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield model(Path(name).resolve() / "model")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "model")
    return tmp_path / "model"


def test_an_untouched_folder_has_no_problems(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == FILES
    assert check_manifest(written, hashes=True) == check_manifest(written, hashes=False) == []
    listed = json.loads((written / "manifest.json").read_text())["files"]
    assert sorted(listed) == sorted(set(FILES) - {"manifest.json"})


@pytest.mark.parametrize("name", FILES)
def test_every_single_flipped_byte_is_found(folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    for place in range(len(data)):
        bit = 1 << place % 8
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        problems = check_manifest(folder, hashes=True)
        assert problems, f"byte {place}"
        assert all(len(line.splitlines()) == 1 for line in problems)
    path.write_bytes(data)
    assert check_manifest(folder, hashes=True) == []


@given(
    st.sampled_from(FILES),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["cut", "insert", "flip"]),
    st.data(),
)
@settings(max_examples=80, deadline=None)
def test_any_flip_cut_or_insertion_is_found(
    written: Path, name: str, at: float, kind: str, data: st.DataObject
) -> None:
    path = written / name
    old = path.read_bytes()
    place = int(at * len(old))
    byte = data.draw(st.integers(1, 255))
    new = {
        "cut": old[:place],
        "insert": old[:place] + bytes([byte]) + old[place:],
        "flip": old[:place] + bytes([old[place] ^ byte]) + old[place + 1 :],
    }[kind]
    try:
        path.write_bytes(new)
        assert check_manifest(written, hashes=True)
        if kind != "flip":
            assert check_manifest(written, hashes=False)
    finally:
        path.write_bytes(old)


def test_sizes_tell_a_cut_a_grown_a_missing_and_a_pointer_file(folder: Path) -> None:
    sizes = {name: (folder / name).stat().st_size for name in FILES}

    def told(name: str, what: str) -> str:
        return f"{folder / name}: expected {sizes[name]} bytes, {what}"

    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "config.json").write_bytes(b"{")
    (folder / "spec.toml").write_bytes(b"x" * 50)
    (folder / "tokenizer.json").unlink()
    expected = [
        told("config.json", "found 1: probably an interrupted copy"),
        told("model.safetensors", "found 43: a Git LFS pointer"),
        told("spec.toml", "found 50: probably something was appended"),
        f"{folder / 'tokenizer.json'}: the file is missing",
    ]
    for hashes in (True, False):
        problems = check_manifest(folder, hashes=hashes)
        assert len(problems) == 4
        assert all(line.startswith(start) for line, start in zip(problems, expected, strict=True))


def test_equal_sizes_are_told_apart_by_hashes_only(folder: Path) -> None:
    (folder / "spec.toml").write_text('name = "tinz"\n')
    assert check_manifest(folder, hashes=False) == []
    (line,) = check_manifest(folder, hashes=True)
    assert "another content" in line


def test_only_weights_that_are_not_listed_are_reported(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    (folder / "pytorch_model.bin").write_bytes(b"")
    problems = check_manifest(folder, hashes=False)
    assert [line.split(":")[0] for line in problems] == [
        str(folder / "model-00002-of-00002.safetensors"),
        str(folder / "pytorch_model.bin"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "files": {}}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"a": 1}}',
        '{"format": 1, "files": {"a": {"size": -1, "sha256": ""}}}',
        '{"format": 1, "files": {"a": {"size": 1}}}',
        '{"format": 1, "files": {}, "files": {}}',
        '{"format":1,"files":{}}',
    ],
)
def test_a_manifest_that_was_not_written_so_is_one_problem(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    (line,) = check_manifest(folder, hashes=True)
    assert line.startswith(str(folder / "manifest.json"))


def test_a_missing_manifest_is_one_problem(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert check_manifest(folder, hashes=True) == [f"{folder / 'manifest.json'}: the file is missing"]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/x", "link"])
def test_names_in_a_manifest_open_nothing_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to("../secret")
    files = {name: {"sha256": "0" * 64, "size": 6}}
    write_json(folder / "manifest.json", {"files": files, "format": 1})
    (line,) = check_manifest(folder, hashes=True)
    assert line.startswith("manifest.json: ")
    assert "SHA-256" not in line


def test_a_manifest_covers_plain_files_only(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(FolderError, match="not a regular file"):
        write_manifest(tmp_path)
