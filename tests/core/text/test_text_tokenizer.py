"""A tokenizer is its folder's files: what they name is there, and what is wrong with them is said."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.errors import FolderError, InputError, MissingExtra
from composeformer.text import Tokenizer
from composeformer.text import tokenizer as tokenizer_module
from composeformer.text.stream import byte_alphabet

NAMED = ["<s>", "</s>", "<pad>", "<tool>"]
IDS = {text: index for index, text in enumerate([*byte_alphabet(), *NAMED])}


def write(folder: Path, tokenizer: dict[str, Any] | None = None, **files: Any) -> Path:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    sound = {
        "version": "1.0",
        "added_tokens": [
            {"id": IDS[text], "content": text, "special": text != "<tool>", **plain} for text in NAMED
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {text: IDS[text] for text in byte_alphabet()}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(sound | (tokenizer or {})), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_text_survives_a_round_trip(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, len(IDS) + 5)), skip=st.booleans())
def test_stream_equals_decode_for_any_ids(ids: list[int], skip: bool, tokenizer: Tokenizer) -> None:
    assert "".join(tokenizer.stream(skip)(ids)) == tokenizer.decode(ids, skip)


def test_special_tokens_in_text_are_recognised_unless_told_otherwise(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<s>a<tool>") == [IDS["<s>"], IDS["a"], IDS["<tool>"]]
    assert tokenizer.encode("<s>", parse_special=False) == [IDS[text] for text in "<s>"]
    assert tokenizer.encode("<s>") == [IDS["<s>"]]  # asking the other way leaves no trace


def test_only_special_tokens_are_skipped(tokenizer: Tokenizer) -> None:
    ids = [IDS[text] for text in ("<s>", "a", "<tool>", "</s>")]
    assert tokenizer.decode(ids) == "<s>a<tool></s>"
    assert tokenizer.decode(ids, skip_special=True) == "a<tool>"


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, (None, (), None)),
        ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, {}, ("<s>", ("</s>",), "<pad>")),
        ({"eos_token": {"content": "</s>", "lstrip": False}}, {}, (None, ("</s>",), None)),
        (
            {},
            {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"},
            ("<s>", ("</s>",), "<pad>"),
        ),
        ({"eos_token": "</s>"}, {"eos_token_id": ["<pad>", "</s>"]}, (None, ("<pad>", "</s>"), None)),
        ({"bos_token": "not there"}, {"bos_token_id": None}, (None, (), None)),
    ],
)
def test_special_ids_come_from_both_files(
    config: dict[str, Any], generation: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    def ids(value: Any) -> Any:
        return [IDS[text] for text in value] if isinstance(value, list) else IDS.get(value)

    numbers = {key: ids(value) for key, value in generation.items()}
    found = Tokenizer(write(tmp_path, tokenizer_config=config, generation_config=numbers))
    bos, ends, pad = expected
    assert found.bos_id == IDS.get(bos)
    assert found.eos_ids == tuple(IDS[text] for text in ends)
    assert found.pad_id == IDS.get(pad)
    assert found.vocab_size == len(IDS)


def test_settings_of_an_old_batch_are_not_kept(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    tokenizer = Tokenizer(write(tmp_path, {"truncation": truncation, "padding": padding}))
    assert len(tokenizer.encode("abcd")) == 4


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="character 1"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("index", [-1, 1 << 32, "a", 1.0])
def test_what_is_no_id_is_refused(index: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="token id"):
        tokenizer.decode([index])
    with pytest.raises(InputError, match="token id"):
        tokenizer.stream().push(index)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"there is no tokenizer\.json"):
        Tokenizer(tmp_path)
    for damage in (b"{}", b"[]", b"nul", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "tokenizer.json").write_bytes(damage)
        with pytest.raises(FolderError, match=r"tokenizer\.json: not") as caught:
            Tokenizer(tmp_path)
        assert len(str(caught.value).splitlines()) == 1
    write(tmp_path)
    for damage in (b"[]", b"nul", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_bytes(damage)
        with pytest.raises(FolderError, match=r"tokenizer_config\.json: "):
            Tokenizer(tmp_path)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "available", lambda package: False)
    with pytest.raises(MissingExtra, match=r"tokenizers: pip install 'composeformer\[text\]'"):
        Tokenizer(write(tmp_path))


def test_importing_the_module_imports_no_extra() -> None:
    from subprocess import run

    code = (
        "import sys, composeformer.text, composeformer.gguf.tokenizer;"
        "print(sorted({'tokenizers', 'jinja2', 'gguf', 'transformers'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # torch itself may bring jinja2
    assert "tokenizers" not in done.stdout
    assert "gguf" not in done.stdout
