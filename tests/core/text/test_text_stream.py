"""Pieces of a stream join to what decoding everything gives, and none of them is ever taken back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.text import Tokenizer
from composeformer.text.stream import ByteStream, byte_alphabet

ALPHABET = byte_alphabet()
TOKEN_OF = {byte: character for character, byte in ALPHABET.items()}


def test_every_byte_has_one_stand_in() -> None:
    assert sorted(ALPHABET.values()) == list(range(256))
    assert TOKEN_OF[ord("a")] == "a"
    assert TOKEN_OF[ord(" ")] == "Ġ"
    assert TOKEN_OF[ord("\n")] == "Ċ"


def by_bytes() -> ByteStream:
    """A vocabulary of single bytes, id = byte."""
    return ByteStream(lambda index: TOKEN_OF[index], ALPHABET)


@given(st.text())
def test_a_character_comes_with_its_last_byte(text: str) -> None:
    stream = by_bytes()
    for character in text:
        *start, last = character.encode()
        assert [stream.push(byte) for byte in start] == [""] * len(start)
        assert stream.push(last) == character
    assert stream.finish() == ""


@given(st.binary())
def test_bytes_that_are_no_text_are_replaced_as_python_does(data: bytes) -> None:
    assert "".join(by_bytes()(data)) == data.decode("utf-8", "replace")


@given(st.text(), st.integers(1, 3))
def test_an_unfinished_character_is_held_until_the_end(text: str, cut: int) -> None:
    data = text.encode() + "😀".encode()[:cut]
    stream = by_bytes()
    assert "".join(stream.push(byte) for byte in data) == text
    assert stream.finish() == "\ufffd"


PIECES = ["▁", "▁a", "b", "▁the", "日", "é", ".", "▁▁"]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's decoder: word marks, byte fallback, and one leading space stripped."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    special = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": names[index], **special} for index in range(3)],
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [],
            "byte_fallback": True,
            "unk_token": "<unk>",
        },
    }
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return Tokenizer(folder)


@settings(max_examples=150, deadline=None)
@given(
    # special tokens, bytes, pieces, and ids beyond the vocabulary
    ids=st.lists(st.integers(0, 2) | st.integers(0, 270) | st.integers(259, 258 + len(PIECES)), max_size=200),
    skip=st.booleans(),
)
def test_pieces_join_with_word_marks_and_byte_fallback(
    ids: list[int], skip: bool, sentencepiece: Tokenizer
) -> None:
    assert "".join(sentencepiece.stream(skip)(ids)) == sentencepiece.decode(ids, skip)


def test_bytes_that_a_later_one_can_spoil_are_held(sentencepiece: Tokenizer) -> None:
    first, second, bad = (3 + byte for byte in (0xC3, 0xA9, 0xFF))
    assert list(sentencepiece.stream()([first, second, 259 + PIECES.index("b")])) == ["éb"]
    assert list(sentencepiece.stream()([first, second, bad])) == ["\ufffd" * 3]


def test_the_space_between_words_is_kept(sentencepiece: Tokenizer) -> None:
    words = [259 + PIECES.index("▁the")] * 300
    stream = sentencepiece.stream()
    assert [stream.push(index) for index in words] == ["the"] + [" the"] * 299


def test_a_long_sequence_is_not_decoded_again_and_again(
    sentencepiece: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, lengths = sentencepiece.decode, []

    def counted(ids: list[int], skip_special: bool = False) -> str:
        lengths.append(len(ids))
        return decode(ids, skip_special)

    monkeypatch.setattr(sentencepiece, "decode", counted)
    list(sentencepiece.stream()([259 + PIECES.index("▁a")] * 2000))
    assert max(lengths) <= 64
