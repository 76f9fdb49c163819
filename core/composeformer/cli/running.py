"""One run of the command line: whatever happens becomes an exit status and at most a line for each finding."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from composeformer.cli.group import compose
from composeformer.cli.streams import STDOUT, prepared, say, silence


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception: what is half written is removed on the way out."""


def run() -> int:
    """Runs `sys.argv`; the exit status."""
    with prepared(), _terminable():
        try:
            return _run()
        except Terminated:
            say("terminated")
            return 143
        except (click.Abort, KeyboardInterrupt):
            say("interrupted")
            return 130


def _run() -> int:
    try:
        code = _command()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            silence(sys.stdout)
        return code
    except click.ClickException as error:
        error.show(file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of standard output has what it wanted.
        silence(sys.stdout)
        return 0
    except OSError as error:
        if os.environ.get("COMPOSE_DEBUG"):
            raise
        if error.filename == STDOUT:
            silence(sys.stdout)
        say(told(error))
        return 2
    except Exception as error:
        return _failed(error)


def _command() -> int:
    if "_COMPOSE_COMPLETE" in os.environ:
        compose.main(prog_name="compose")
    # Not click's own `main`: it answers a broken pipe with status 1.
    try:
        with compose.make_context("compose", sys.argv[1:]) as context:
            found = compose.invoke(context)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        # A plugin's own sys.exit: its status would say of this command what is not so.
        return _failed(error)
    return found if isinstance(found, int) else 0


def told(error: OSError) -> str:
    """What the system refused, in one line: which file or stream, and why."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def _failed(error: BaseException) -> int:
    from composeformer.errors import ComposeError

    if isinstance(error, ComposeError):
        for line in error.lines:
            say(line)
        return error.exit_code
    if os.environ.get("COMPOSE_DEBUG"):
        raise error
    said = " ".join(str(error).split())[:500]
    say(f"internal error: {type(error).__name__}: {said} (--debug shows the traceback)")
    return 70


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, where the system and the thread allow it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: Any) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
