"""Laws tried in a process of their own, so that a part that ends it, crashes it or never returns breaks one law.

One child tries law after law; where it dies, or a law takes too long, that law is broken and a new child goes on with
the next. The child computes with one thread: those of its parent do not survive a fork. It is a process group of its
own, which is ended with it; on Linux it does not outlive its parent either. Where a system can not fork, laws are tried
in this process.
"""

import ctypes
import faulthandler
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
import torch

from composeformer.errors import ComposeError
from composeformer.testing.certificate import Finding, Tried, examine
from composeformer.testing.law import Law

PR_SET_PDEATHSIG = 1  # of prctl(2)
# Seconds that a law may take.
PATIENCE = 600.0
# Seconds after which a child that said nothing is looked for: processes that it started may hold its pipe open.
PULSE = 1.0
ENDING = (signal.SIGINT, signal.SIGTERM)
# The exit code of a child whose pipe is closed (EX_IOERR).
CLOSED = 74
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)')

Trials = Sequence[tuple[Law, Tried]]


def guarded(
    trials: Trials, *, examples: int | None = None, seed: int = 0, patience: float = PATIENCE
) -> Iterator[Finding]:
    """The findings of `trials`, in their order; `patience` is how many seconds each may take.

    Raises what trying a law raises when it is not the part that is wrong.
    """
    if "fork" not in get_all_start_methods():
        for law, tried in trials:
            yield examine(law, tried, examples=examples, seed=seed)
        return
    done = 0
    while done < len(trials):
        with tempfile.TemporaryDirectory() as folder:
            child = _Child(trials[done:], examples, seed, Path(folder))
            try:
                child.start()
                for finding in child.findings(patience):
                    yield finding
                    done += 1
            finally:
                child.end()


class _Child:
    """A process that tries laws, as its parent sees it."""

    def __init__(self, trials: Trials, examples: int | None, seed: int, folder: Path) -> None:
        self.trials, self.seed, self.folder = trials, seed, folder
        context = get_context("fork")
        self.pipe, self.far_end = context.Pipe(duplex=False)
        arguments = trials, examples, seed, folder, self.far_end
        self.process = context.Process(target=_try, args=arguments)

    def start(self) -> None:
        """Starts it. An interrupt comes before, or when there is a process that can be ended."""
        with _uninterrupted():
            self.process.start()
            self.far_end.close()

    def findings(self, patience: float) -> Iterator[Finding]:
        """One of each law, up to that at which the process ended."""
        for law, tried in self.trials:
            begun = time.monotonic()
            found = self._next(patience)
            if isinstance(found, Exception):
                raise found
            if isinstance(found, str):
                yield self._broken(law, tried, found, time.monotonic() - begun)
                return
            yield found

    def _next(self, patience: float) -> Finding | Exception | str:
        """What the process sends next, or why it sends nothing more."""
        until = time.monotonic() + patience
        while True:
            alive = self.process.is_alive()
            left = until - time.monotonic()
            if self.pipe.poll(min(max(left, 0.0), PULSE) if alive else 0.0):
                try:
                    found: Finding | Exception = self.pipe.recv()
                    return found
                except (EOFError, OSError):
                    if not self._ended(PULSE):
                        return "closed files of the process that it had not opened"
                    break
            if not alive:
                break
            if left <= 0:
                return f"was not done after {patience:g} s{self._place()}"
        if self.process.exitcode == CLOSED:
            return "closed files of the process that it had not opened"
        return f"ended the process with {_status(self.process.exitcode)}{self._stood()}"

    def _ended(self, seconds: float) -> bool:
        """Whether it ends in time. `join` asks a pipe, which a part may have closed, and waits then without end."""
        until = time.monotonic() + seconds
        while self.process.is_alive():
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def _broken(self, law: Law, tried: Tried, why: str, seconds: float) -> Finding:
        try:
            case = json.loads(_read(self.folder / "values"))
        except ValueError:  # nothing was drawn, or it was ended while it wrote
            case = {"cases": 0, "values": {}}
        return Finding.of(
            law,
            tried,
            verdict="broken",
            cases=case["cases"] + 1,
            error=0.0,
            bound=0.0,
            seed=self.seed,
            seconds=seconds,
            why=why,
            values=case["values"] or None,
        )

    def _place(self) -> str:
        """Where the process stands now."""
        if self.process.pid is None:
            return ""
        os.kill(self.process.pid, signal.SIGUSR1)
        until = time.monotonic() + 1.0
        while not (told := self._stood()) and time.monotonic() < until:
            time.sleep(0.02)
        return told

    def _stood(self) -> str:
        """Where the process stood when it was asked, or when it crashed."""
        found = FRAME.search(_read(self.folder / "stack"))
        if found is None:
            return ""
        file = "/".join(Path(found["file"]).parts[-2:])
        return f": it stood at {file}:{found['line']} in {found['function']}"

    def end(self) -> None:
        """Ends the process, and those of its group: all that it has started, but for sessions of their own."""
        if self.process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):  # the group is gone
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()  # it may have left its group
            self.process.join()
        self.far_end.close()
        self.pipe.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that end this process wait until the end; a process that is started within inherits that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _status(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


@attrs.frozen
class _Noted:
    """Keeps the values of the case that is tried now in a file, for when the process does not come back."""

    file: int

    def __call__(self, cases: int, values: Mapping[str, Any]) -> None:
        told = json.dumps({"cases": cases, "values": values}, default=str).encode()
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, told, 0)


def _end_with_parent() -> None:
    """On Linux, to be killed when the parent is: it can not end its child then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _try(trials: Trials, examples: int | None, seed: int, folder: Path, end: Connection) -> None:
    own = os.getpid()
    os.setpgid(0, 0)
    _end_with_parent()
    for each in ENDING:
        signal.signal(each, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    # What parts print is no part of a report. Of the parent's own streams another of its threads may hold a lock.
    os.dup2(2, 1)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    values = os.open(folder / "values", os.O_CREAT | os.O_RDWR)
    with open(folder / "stack", "w", encoding="utf-8") as stack:
        faulthandler.enable(stack, all_threads=False)
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        for law, tried in trials:
            os.ftruncate(values, 0)
            found: Finding | ComposeError
            try:
                found = examine(law, tried, examples=examples, seed=seed, watch=_Noted(values))
            except Exception as error:
                found = error if type(error) is ComposeError else ComposeError(*_lines(error))
            if os.getpid() != own:
                os._exit(0)  # a part has forked, and only one was asked
            try:
                end.send(found)
            except OSError:
                os._exit(CLOSED)
            if isinstance(found, ComposeError):
                return


def _lines(error: Exception) -> tuple[str, ...]:
    """Of an error that may not survive the way to another process."""
    return error.lines if isinstance(error, ComposeError) else (f"{type(error).__name__}: {error}",)
