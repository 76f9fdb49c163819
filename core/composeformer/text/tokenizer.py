"""The tokenizer of a model folder: `tokenizer.json`, run by the tokenizers library, and its special ids."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from composeformer.errors import FolderError, InputError, MissingExtra, show
from composeformer.lazy import available
from composeformer.text.files import read_chat_template, read_json, read_text
from composeformer.text.stream import ByteStream, Stream, WindowStream, byte_alphabet

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Text to ids and back. `bos_id` and `pad_id` are None, `eos_ids` empty, where the folder names none."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Reads tokenizer.json, tokenizer_config.json, generation_config.json and the chat template of
        `folder`.

        Raises FolderError for missing or damaged files and MissingExtra without the tokenizers package.
        """
        if not available("tokenizers"):
            raise MissingExtra("tokenizers", "text", "reading a tokenizer")
        folder = Path(folder)
        text = read_text(folder, "tokenizer.json")
        if text is None:
            raise FolderError(f"{folder}: there is no tokenizer.json")
        self._json = text
        self._path = folder / "tokenizer.json"
        self._backend = self._load()
        self._plain: tokenizers.Tokenizer | None = None  # the same, blind to special tokens in text
        self._special = {
            index for index, token in self._backend.get_added_tokens_decoder().items() if token.special
        }
        self._alphabet = byte_alphabet()
        decoder = json.loads(text).get("decoder") or {}
        self._byte_level = decoder.get("type") == "ByteLevel"

        config = read_json(folder, "tokenizer_config.json")
        generation = read_json(folder, "generation_config.json")
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.chat_template: str | None = read_chat_template(folder, config)
        self.bos_token = _content(config.get("bos_token"))
        self.eos_token = _content(config.get("eos_token"))
        ends = [*_ids(folder, generation, "eos_token_id"), *self._named(self.eos_token)]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        bos = [*self._named(self.bos_token), *_ids(folder, generation, "bos_token_id")]
        pad = [*self._named(_content(config.get("pad_token"))), *_ids(folder, generation, "pad_token_id")]
        self.bos_id: int | None = next(iter(bos), None)
        self.pad_id: int | None = next(iter(pad), None)

    def encode(self, text: str, add_special: bool = True, *, parse_special: bool = True) -> list[int]:
        """Ids of `text`. `add_special` adds what the tokenizer puts around a text (a beginning-of-text token,
        ...); without `parse_special` the names of special tokens in the text are plain characters.

        Raises InputError for text that is not Unicode (a lone surrogate).
        """
        backend = self._backend if parse_special else self._without_special()
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as problem:
            raise InputError(f"text: not Unicode at character {problem.start} (a lone surrogate)") from None
        ids: list[int] = backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`; what is not UTF-8 becomes U+FFFD, and ids beyond the vocabulary say nothing.

        Raises InputError for what is not an id at all.
        """
        ids = list(ids)
        for index in ids:
            _check(index)
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special)
        return text

    def stream(self, skip_special: bool = False) -> Stream:
        """A decoder for ids as they come; its pieces joined equal `decode` of all of them."""

        def token(index: int) -> str | None:
            return self._token(index, skip_special)

        if self._byte_level:
            return ByteStream(token, self._alphabet)
        return WindowStream(self.decode, token)

    def _token(self, index: int, skip_special: bool) -> str | None:
        _check(index)
        if skip_special and index in self._special:
            return None
        token: str | None = self._backend.id_to_token(index)
        return token

    def _named(self, token: str | None) -> list[int]:
        index = None if token is None else self._backend.token_to_id(token)
        return [] if index is None else [index]

    def _load(self) -> "tokenizers.Tokenizer":
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_str(self._json)
        except Exception as problem:  # the library raises bare Exception
            raise FolderError(f"{self._path}: not a tokenizer: {' '.join(str(problem).split())}") from None
        # A file may carry the settings of the batch it was last used for.
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _without_special(self) -> "tokenizers.Tokenizer":
        # A second instance: toggling the first would show in other threads.
        if self._plain is None:
            self._plain = self._load()
            self._plain.encode_special_tokens = True
        return self._plain


def _check(index: int) -> None:
    if not isinstance(index, int) or not 0 <= index < 1 << 32:
        raise InputError(f"token id {index!r}: must be an integer from 0")


def _content(value: object) -> str | None:
    """A special token as tokenizer_config.json gives it: a string, or an object with its settings."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(folder: Path, generation: Mapping[str, object], key: str) -> list[int]:
    """The ids of a key of generation_config.json: an integer, several, or none. Below 0 means none too."""
    value = generation.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    found: list[int] = []
    for index in values:
        if type(index) is not int:
            where = folder / "generation_config.json"
            raise FolderError(f"{where}: {key} = {show(index)}: must be an integer or a list of integers")
        found += [index] if index >= 0 else []
    return found
