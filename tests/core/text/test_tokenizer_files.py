"""Tokenizer files are carried over byte for byte, and nothing else is."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from composeformer.errors import FolderError
from composeformer.text import TOKENIZER_FILES, copy_tokenizer
from composeformer.text import files as files_module
from composeformer.text.files import read_chat_template


def test_the_listed_files_and_no_others_are_copied_verbatim(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    dst.mkdir()
    for name in [*TOKENIZER_FILES, "model.safetensors", "tokenizer.py", "tokenizer.json.bak"]:
        (src / name).write_bytes(name.encode() + b"\r\n\xff")
    assert copy_tokenizer(src, dst) == list(TOKENIZER_FILES)
    assert sorted(path.name for path in dst.iterdir()) == sorted(TOKENIZER_FILES)
    for name in TOKENIZER_FILES:
        assert (dst / name).read_bytes() == (src / name).read_bytes()


def test_a_folder_without_them_gives_none(tmp_path: Path) -> None:
    assert copy_tokenizer(tmp_path, tmp_path) == []


@pytest.mark.parametrize("kind", ["out", "dangling", "loop", "folder", "pipe", "large"])
def test_what_is_unsafe_is_refused_before_anything_is_copied(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    dst.mkdir()
    (src / "tokenizer.json").write_text("{}")
    bad = src / "vocab.json"
    secret = tmp_path / "secret"
    secret.write_text("secret")
    if kind == "out":
        bad.symlink_to(secret)
    elif kind == "dangling":
        bad.symlink_to(src / "nothing")
    elif kind == "loop":
        bad.symlink_to(bad)
    elif kind == "folder":
        bad.mkdir()
    elif kind == "pipe":
        os.mkfifo(bad)
    else:
        monkeypatch.setattr(files_module, "MAX_BYTES", 3)
        bad.write_text("1234")
    with pytest.raises(FolderError) as caught:
        copy_tokenizer(src, dst)
    assert str(bad) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(dst.iterdir()) == []


def test_links_inside_and_into_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot, dst = tmp_path / "blobs", tmp_path / "snapshots" / "0abc", tmp_path / "dst"
    for folder in (blobs, snapshot, dst):
        folder.mkdir(parents=True)
    (blobs / "123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    (snapshot / "real").write_text("merges")
    (snapshot / "merges.txt").symlink_to("real")
    assert copy_tokenizer(snapshot, dst) == ["tokenizer.json", "merges.txt"]
    assert not (dst / "tokenizer.json").is_symlink()
    (snapshot / "vocab.json").symlink_to("../../secret")
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(FolderError, match="leads out of the folder"):
        copy_tokenizer(snapshot, dst)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("plain", "plain"),
        ([], None),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "only", "template": "o"}], "o"),
    ],
)
def test_the_default_template_is_chosen(value: Any, expected: str | None, tmp_path: Path) -> None:
    assert read_chat_template(tmp_path, {"chat_template": value}) == expected
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert read_chat_template(tmp_path, {"chat_template": value}) == "from the file"


@pytest.mark.parametrize(
    "value", [3, {"default": "d"}, ["d"], [{"name": "a"}], [{"name": n, "template": n} for n in "ab"]]
)
def test_a_template_list_without_a_choice_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="chat_template"):
        read_chat_template(tmp_path, json.loads(json.dumps({"chat_template": value})))
