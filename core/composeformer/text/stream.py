"""Text from tokens as they come, never taking a character back.

A token is a piece of bytes, not of text: half a character must wait for the other half. For byte-level
vocabularies (GPT-2's, in which every byte has a printable stand-in) the bytes go through an incremental UTF-8
decoder; it replaces what can no longer become a character exactly where decoding everything at once does.
Other decoders (SentencePiece's) strip, join and fall back to bytes across tokens, so they are asked to decode
a window, and only what a further token can not change is given out.
"""

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

BYTE = re.compile("<0x[0-9A-F]{2}>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# The window of the general decoder: tokens kept when it is cut back, and the length at which that happens.
KEEP, GROW = 8, 64


def byte_alphabet() -> dict[str, int]:
    """GPT-2's stand-in for each byte, inverted: printable Latin-1 is itself, the rest follow at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(rest)
    }


class Stream(ABC):
    """`push(id)` gives the text that became certain, `finish()` what was held back: all decoded ids."""

    @abstractmethod
    def push(self, index: int) -> str: ...

    @abstractmethod
    def finish(self) -> str: ...

    def __call__(self, ids: Iterable[int]) -> Iterable[str]:
        """The pieces of a whole sequence; empty ones are left out."""
        for index in ids:
            if piece := self.push(index):
                yield piece
        if piece := self.finish():
            yield piece


class ByteStream(Stream):
    """Byte-level vocabularies. `token` gives a token's stand-in characters, None for a silent one."""

    def __init__(self, token: Callable[[int], str | None], alphabet: Mapping[str, int]) -> None:
        self._token = token
        self._alphabet = alphabet
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        token = self._token(index)
        return "" if token is None else self._decoder.decode(token_bytes(token, self._alphabet))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def token_bytes(token: str, alphabet: Mapping[str, int]) -> bytes:
    """The bytes a token stands for; one with a character outside the alphabet (an added one) is itself."""
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


class WindowStream(Stream):
    """Any other vocabulary. `decode` decodes whole sequences, `token` is as for `ByteStream`.

    A run of byte tokens is held until it ends: if it is no UTF-8, all of it becomes replacement characters.
    """

    def __init__(self, decode: Callable[[list[int]], str], token: Callable[[int], str | None]) -> None:
        self._decode = decode
        self._token = token
        self._ids: list[int] = []
        self._given = 0  # characters of the window's text that are out already

    def push(self, index: int) -> str:
        token = self._token(index)
        if token is None:
            return ""
        self._ids.append(index)
        if BYTE.fullmatch(token):
            return ""
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        piece = text[self._given :]
        self._given = len(text)
        if len(self._ids) >= GROW:
            self._shorten(text)
        return piece

    def finish(self) -> str:
        text = self._decode(self._ids)
        piece = text[self._given :]
        self._ids, self._given = [], 0
        return piece

    def _shorten(self, text: str) -> None:
        """Forget all but the last tokens, if what they decode to is how the text ends."""
        tail = self._decode(self._ids[-KEEP:])
        if tail.strip() and text.endswith(tail):
            self._ids = self._ids[-KEEP:]
            self._given = len(tail)
