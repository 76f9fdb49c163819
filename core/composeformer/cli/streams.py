"""Standard streams that are closed, full, gone or of another encoding: none of it may change what a command means."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

STDOUT = "standard output"


class Output:
    """Standard output, which names itself where it can not be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._failing():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            error.filename = STDOUT
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Deaf(Output):
    """Standard error, which never fails: a message that nobody hears changes no exit status."""

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            silence(self._stream)


@contextmanager
def prepared() -> Iterator[None]:
    """Streams for one run of the command line: all are there, and take every character."""
    before = sys.stdout, sys.stderr
    if not leads():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        # Closed by whoever started us. Writing must fail, but only where something is written.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    _tolerate(sys.stdout, "replace")
    _tolerate(sys.stderr, "backslashreplace")
    sys.stdout, sys.stderr = cast(TextIO, Output(sys.stdout)), cast(TextIO, Deaf(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def leads() -> bool:
    """Whether this process speaks for all: it is the first of those that torchrun started, or the only one."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def silence(stream: TextIO) -> None:
    """Lets what a dead stream still holds go, so that Python finds no fault when it flushes at the end."""
    with suppress(OSError, ValueError, AttributeError):
        place = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, place)
        os.close(null)


def say(line: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"compose: {visible(line)}\n")
    sys.stderr.flush()


def visible(text: str, keep: str = "") -> str:
    """The text without what a terminal would obey: controls are escaped (save those in `keep`), newlines spaces."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else " " if c == "\n" else c.encode("unicode_escape").decode()
        for c in text
    )


def _tolerate(stream: Any, errors: str) -> None:
    with suppress(AttributeError, ValueError):
        stream.reconfigure(errors=errors)
