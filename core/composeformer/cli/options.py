"""Options and printing that several commands share."""

import atexit
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

from composeformer.cli.streams import leads, silence, visible

F = TypeVar("F", bound=Callable[..., Any])

SPEC_HELP = "SPEC is a TOML file or the name of a shipped spec."


def set_option(function: F) -> F:
    """`--set path=value`, repeatable."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="PATH=VALUE",
        help="Override one value, as ffn.dense.bias=true (repeatable).",
    )(function)


class SpecName(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A shipped spec's name, a file or a model folder; it only knows how to complete itself."""

    name = "spec"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        from composeformer.spec.inherit import shipped

        names = [CompletionItem(name) for name in shipped() if name.startswith(incomplete)]
        return [*names, CompletionItem(incomplete, type="file")]


SPEC = SpecName()


def one_process() -> None:
    """Raises InputError where several processes were started, for a command of which each would do all the work."""
    from composeformer.errors import InputError

    started = os.environ.get("WORLD_SIZE") or "1"
    if started != "1":
        command = click.get_current_context().info_name
        raise InputError(f"WORLD_SIZE = {started}: compose {command} runs in one process; start it without torchrun")


def json_option(function: F) -> F:
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        is_eager=True,
        callback=_only_json,
        help="Print exactly one JSON document on stdout.",
    )(function)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, for a command that keeps all it makes until it has printed it: what is left goes
    with the process, and nobody looks through it first.
    """
    enabled = gc.isenabled()
    gc.disable()
    atexit.register(_leave)
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _leave() -> None:
    # The tensor plane's libraries count what they find left of theirs, and say so.
    if "torch" not in sys.modules:
        gc.freeze()


_STDOUT = "composeformer.stdout"


def _only_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    """From here on only `print_json` reaches stdout; what a plugin prints goes to stderr."""
    if value and not ctx.resilient_parsing:
        ctx.meta[_STDOUT] = sys.stdout
        ctx.with_resource(redirect_stdout(sys.stderr))
    return value


def device_options(function: F) -> F:
    """`--device`, `--dtype`."""
    function = click.option(
        "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, or meta for shapes only."
    )(function)
    return click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
        default=None,
        help="Full precision in this dtype, instead of the spec's policy.",
    )(function)


def print_json(document: object) -> None:
    """One JSON document and a newline."""
    context = click.get_current_context(silent=True)
    stream: TextIO = (context.meta if context else {}).get(_STDOUT) or sys.stdout
    unicode = (stream.encoding or "").lower().startswith("utf")
    text = json.dumps(document, indent=2, ensure_ascii=not unicode, allow_nan=False)
    # JSON itself lets these stand, and terminals obey them.
    text = text.translate({code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)})
    try:
        stream.write(text + "\n")
    except BrokenPipeError:
        # Nothing is left to do but to end with the status that was found.
        silence(stream)


def console(stderr: bool = False) -> Any:
    """A rich console; rich is imported here and nowhere earlier."""
    from rich.console import Console

    class Screen(Console):
        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                if segment.text.isprintable():
                    yield segment
                    continue
                # Names come from specs and plugins: no terminal shall obey them.
                text = segment.text if segment.control else visible(segment.text, keep="\n")
                yield segment._replace(text=text)

        def on_broken_pipe(self) -> None:
            raise

    screen = Screen(stderr=stderr, highlight=False, emoji=False)
    # A pipe has no width; 80 columns would fold what a log can hold.
    return screen if screen.is_terminal else Screen(stderr=stderr, highlight=False, emoji=False, width=120)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr for what takes longer than a second, where stderr is a terminal."""
    if not (sys.stderr.isatty() and leads()):
        yield lambda done, total: None
        return
    from time import monotonic

    from rich.progress import Progress

    bar = Progress(console=console(stderr=True), transient=True)
    started = monotonic()
    task: list[Any] = []

    def advance(done: int, total: int) -> None:
        if not task and monotonic() - started > 1:
            bar.start()
            task.append(bar.add_task(what, total=total))
        if task:
            bar.update(task[0], completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def big(value: float) -> str:
    """A count with its unit: 134,515,008 (134.5M)."""
    for bound, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= bound:
            return f"{value / bound:.4g}{letter}"
    return f"{value:g}"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for bound, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= bound:
            return f"{count / bound:.2f} {unit}"
    return f"{count:.0f} B"
