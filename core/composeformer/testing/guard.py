"""Laws tried in a process of their own, so that a part that ends it, crashes it or never returns breaks one law.

One child tries law after law; where it dies, or a law takes too long, that law is broken and a new child goes on with
the next. The child computes with one thread: those of its parent do not survive a fork. Where a system can not fork,
laws are tried in this process.
"""

import faulthandler
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import attrs
import torch

from composeformer.errors import ComposeError
from composeformer.testing.certificate import Finding, Tried, examine
from composeformer.testing.law import Law

# Seconds that a law may take.
PATIENCE = 600.0
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
        self.pipe, end = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_try, args=(trials, examples, seed, folder, end))
        self.process.start()
        end.close()

    def findings(self, patience: float) -> Iterator[Finding]:
        """One of each law, up to that at which the process ended."""
        for law, tried in self.trials:
            begun = time.monotonic()
            why = None
            if not wait([self.pipe, self.process.sentinel], patience):
                why = f"was not done after {patience:g} s{self._place()}"
            else:
                try:
                    found = self.pipe.recv() if self.pipe.poll() else None
                except EOFError:
                    found = None
                if isinstance(found, Exception):
                    raise found
                if found is not None:
                    yield found
                    continue
                self.process.join(5.0)
                why = f"ended the process with {_status(self.process.exitcode)}{self._stood()}"
            yield self._broken(law, tried, why, time.monotonic() - begun)
            return

    def _broken(self, law: Law, tried: Tried, why: str, seconds: float) -> Finding:
        told = _read(self.folder / "values") or '{"cases": 0, "values": {}}'
        case = json.loads(told)
        return Finding(
            law=law.id,
            told=law.told,
            slot=tried.slot,
            kind=tried.kind,
            implementation=tried.implementation.name,
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
        if self.process.pid is None or not hasattr(signal, "SIGUSR1"):
            return ""
        os.kill(self.process.pid, signal.SIGUSR1)
        until = time.monotonic() + 1.0
        while not (told := self._stood()) and time.monotonic() < until:
            self.process.join(0.02)
        return told

    def _stood(self) -> str:
        """Where the process stood when it was asked, or when it crashed."""
        found = FRAME.search(_read(self.folder / "stack"))
        if found is None:
            return ""
        file = "/".join(Path(found["file"]).parts[-2:])
        return f": it stood at {file}:{found['line']} in {found['function']}"

    def end(self) -> None:
        """Ends the process, and those that it has started."""
        if self.process.pid is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self.process.kill()
        self.process.join()
        self.pipe.close()


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


def _try(trials: Trials, examples: int | None, seed: int, folder: Path, end: Connection) -> None:
    os.setpgid(0, 0)
    # What parts print is no part of a report.
    os.dup2(2, 1)
    torch.set_num_threads(1)
    values = os.open(folder / "values", os.O_CREAT | os.O_RDWR)
    with open(folder / "stack", "w", encoding="utf-8") as stack:
        faulthandler.enable(stack, all_threads=False)
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        for law, tried in trials:
            os.ftruncate(values, 0)
            try:
                end.send(examine(law, tried, examples=examples, seed=seed, watch=_Noted(values)))
            except Exception as error:
                end.send(error if type(error) is ComposeError else ComposeError(*_lines(error)))
                return


def _lines(error: Exception) -> tuple[str, ...]:
    """Of an error that may not survive the way to another process."""
    return error.lines if isinstance(error, ComposeError) else (f"{type(error).__name__}: {error}",)
