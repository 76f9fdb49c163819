"""An index is input: it opens no file outside its folder, and must agree with the shards on every tensor."""

import builtins
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.errors import FolderError
from composeformer.folder import WeightReader, inside, reader, write_shards
from composeformer.folder.paths import INDEX

EVIL = [
    "../secret.safetensors",
    "..\\secret.safetensors",
    "/etc/passwd",
    "sub/../../secret.safetensors",
    "./model-00001-of-00002.safetensors",
    "sub/inner.safetensors",
    "C:secret.safetensors",
    "c:\\secret.safetensors",
    "\\\\host\\share.safetensors",
    "..",
    ".",
    "",
    "model\0.safetensors",
    "\ud800.safetensors",
    "link.safetensors",
    "folder.safetensors",
    "pipe.safetensors",
    "loop.safetensors",
    "x" * 5000 + ".safetensors",
]


class Opened:
    """Every path that `open` and safe_open were given, resolved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        for place, name in ((builtins, "open"), (reader, "safe_open"), (os, "open")):
            monkeypatch.setattr(place, name, self.spy(getattr(place, name)))

    def spy(self, call: Any) -> Any:
        def opened(path: Any, *rest: Any, **more: Any) -> Any:
            if not isinstance(path, int):
                self.paths.append(Path(path).resolve())
            return call(path, *rest, **more)

        return opened


def sharded(root: Path) -> Path:
    """A folder of two shards, beside a file that it must not reach."""
    folder = root / "folder"
    folder.mkdir()
    write_shards(folder, [("a", torch.zeros(4)), ("b", torch.ones(4))], max_shard_bytes=16)
    (root / "other").mkdir()
    write_shards(root / "other", [("a", torch.zeros(4))])
    (root / "other" / "model.safetensors").rename(root / "secret.safetensors")
    (folder / "link.safetensors").symlink_to("../secret.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "sub").mkdir()
    (folder / "sub" / "inner.safetensors").write_bytes((root / "secret.safetensors").read_bytes())
    return folder


def point(folder: Path, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["a"] = file
    (folder / INDEX).write_text(json.dumps(index))


def lines(folder: Path) -> tuple[str, ...]:
    with pytest.raises(FolderError) as error:
        WeightReader(folder)
    assert all(len(line.splitlines()) == 1 for line in error.value.lines)
    return error.value.lines


@pytest.mark.parametrize("name", EVIL, ids=[ascii(name)[:30] for name in EVIL])
def test_no_name_in_the_index_opens_a_file_outside(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sharded(tmp_path)
    point(folder, name)
    opened = Opened(monkeypatch)
    (line,) = lines(folder)
    assert f"{INDEX}: weight_map" in line
    assert {path.parent for path in opened.paths} == {folder}
    assert {path.name for path in opened.paths} <= {INDEX, "model-00002-of-00002.safetensors"}


@given(
    st.lists(
        st.sampled_from(["..", ".", "/", "\\", "a", "C:", "\0", "link", "sub", ".safetensors"]), max_size=6
    )
)
@settings(max_examples=60, deadline=None)
def test_inside_gives_a_file_of_the_folder_or_refuses(parts: list[str]) -> None:
    name = "".join(parts)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place).resolve() / "root"
        (root / "sub").mkdir(parents=True)
        for path in (root / "a", root / "sub" / "a", root.parent / "a", root / "a.safetensors"):
            path.write_text("")
        (root / "link").symlink_to("../a")
        try:
            found = inside(root, name, source="index.json")
        except FolderError as error:
            told = str(error)
        else:
            assert found.resolve().parent == root
            assert found.is_file()
            return
    assert told.startswith("index.json: ")
    assert len(told.splitlines()) == 1


def test_links_within_the_folder_and_its_download_cache_are_followed(tmp_path: Path) -> None:
    home = tmp_path / "models--org--name"
    folder = home / "snapshots" / "0123"
    (home / "blobs").mkdir(parents=True)
    folder.mkdir(parents=True)
    write_shards(folder, [("a", torch.arange(3))])
    (folder / "model.safetensors").rename(home / "blobs" / "abc")
    (folder / "model.safetensors").symlink_to("../../blobs/abc")
    with WeightReader(folder) as opened:
        assert opened.get("a").tolist() == [0, 1, 2]
    (tmp_path / "secret").write_bytes((home / "blobs" / "abc").read_bytes())
    (home / "blobs" / "abc").unlink()
    (home / "blobs" / "abc").symlink_to(tmp_path / "secret")
    assert "leaves the folder" in lines(folder)[0]


def test_tensors_that_index_and_shards_disagree_on_are_all_listed(tmp_path: Path) -> None:
    write_shards(tmp_path, [(name, torch.zeros(4)) for name in "abcd"], max_shard_bytes=32)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["a"]
    index["weight_map"] |= {"b": two, "x": one, "y": two}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert sorted(lines(tmp_path)) == sorted(
        [
            f"{tmp_path / one}: holds tensor 'a', which {INDEX} does not list",
            f"{tmp_path / two}: lacks tensor 'b', which is in {one} instead",
            f"{tmp_path / one}: lacks tensor 'x', which {INDEX} puts there",
            f"{tmp_path / two}: lacks tensor 'y', which {INDEX} puts there",
        ]
    )


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for shard in ("one", "two"):
        (tmp_path / shard).mkdir()
        write_shards(tmp_path / shard, [("a", torch.zeros(1)), (shard, torch.zeros(1))])
        (tmp_path / shard / "model.safetensors").rename(tmp_path / f"{shard}.safetensors")
    places = {"a": "one.safetensors", "one": "one.safetensors", "two": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    assert lines(tmp_path) == (
        f"{tmp_path}: tensor 'a' is in two files, one.safetensors and two.safetensors",
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not valid JSON"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs twice"),
        ('{"weight_map": {}, "weight_map": {}}', "occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "no other is opened"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "missing"),
    ],
)
def test_an_index_of_another_shape_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    (line,) = lines(tmp_path)
    assert told in line
    assert line.startswith(str(tmp_path / INDEX))


def test_an_oversized_index_is_not_parsed(tmp_path: Path) -> None:
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(100_000_001)
    assert "larger than the 100,000,000 bytes" in lines(tmp_path)[0]


def test_two_answers_to_where_the_weights_are_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [("a", torch.zeros(4)), ("b", torch.zeros(4))], max_shard_bytes=16)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    assert "does not name it" in lines(tmp_path)[0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.PTH", "weights.pkl", "last.ckpt"])
def test_pickled_weights_are_never_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    opened = Opened(monkeypatch)
    (line,) = lines(tmp_path)
    assert "pickle" in line
    assert name in line
    assert not opened.paths


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model-00001-of-00002.safetensors"])
def test_shards_without_an_index_are_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    assert name in lines(tmp_path)[0]
    assert INDEX in lines(tmp_path)[0]


def test_a_folder_without_weights_and_no_folder_are_told(tmp_path: Path) -> None:
    assert "holds no weights" in lines(tmp_path)[0]
    assert "can not be opened: No such file" in lines(tmp_path / "missing")[0]
    (tmp_path / "file").write_text("")
    assert "can not be opened: Not a directory" in lines(tmp_path / "file")[0]


def test_an_unknown_tensor_names_the_nearest(tmp_path: Path) -> None:
    write_shards(tmp_path, [("layers.0.mixer.q.weight", torch.zeros(1))])
    with WeightReader(tmp_path) as opened:
        for call in (opened.get, opened.get_slice):
            with pytest.raises(FolderError, match=r"did you mean 'layers\.0\.mixer\.q\.weight'"):
                call("layers.0.mixer.k.weight")


def test_names_are_sorted_and_can_not_be_changed(tmp_path: Path) -> None:
    write_shards(tmp_path, [(name, torch.zeros(4)) for name in "cab"], max_shard_bytes=16)
    with WeightReader(tmp_path) as opened:
        assert list(opened.names()) == ["a", "b", "c"]
        with pytest.raises(TypeError):
            opened.names()["d"] = opened.names()["a"]  # type: ignore[index]
