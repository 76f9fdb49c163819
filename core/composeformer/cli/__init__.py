"""The command line: `compose COMMAND`. Each command is a module of this package, imported when it runs.

Exit status: 0 done; 1 a comparison, a law or a diagnosis failed; 2 the input was wrong; 70 an internal
error; 130 interrupted.
"""

import os
import sys
from typing import NoReturn

import click

# Static, so that help needs no command's imports.
COMMANDS = {
    "build": "Assemble a model from a spec; with -o write a model folder.",
    "check": "Validate specs and nothing else.",
    "show": "A spec's component tree, precision by role, and where values come from.",
    "cost": "Parameters, cache and floating-point operations of a spec.",
    "plugins": "What is installed, from where.",
    "schema": "JSON Schema of specs, for editors.",
    "import": "A Hugging Face folder or a GGUF file becomes a model folder.",
    "export": "A model folder becomes a plain Hugging Face folder.",
    "verify": "Compare two models: structure, tensors, outputs; name the first difference.",
    "generate": "Text from a model folder, streamed.",
    "doctor": "What this machine offers, and why not.",
    "completion": "A script that completes commands in your shell.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from composeformer.lazy import load

        command: click.Command = load(f"composeformer.cli.{cmd_name}_command:command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from composeformer.errors import nearest

            near = nearest(args[0], COMMANDS) if args else None
            hint = f" Did you mean {near!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from composeformer import __version__
        from composeformer.plugins import current

        click.echo(f"composeformer {__version__}")
        for info in current().infos:
            click.echo(f"  {info.name} ({info.distribution} {info.version}, {info.status})")
        ctx.exit()


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("--no-plugin", multiple=True, metavar="NAME", help="Do not load this plugin (repeatable).")
@click.option("--strict-plugins", is_flag=True, help="A plugin that fails to load is an error.")
@click.option("--debug", is_flag=True, help="Show the traceback of an internal error.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=False,
    expose_value=False,
    callback=_version,
    help="Versions, plugins included.",
)
def compose(no_plugin: tuple[str, ...], strict_plugins: bool, debug: bool) -> None:
    """Compose efficient language models from plugins: a TOML spec becomes a running model."""
    _plain_logging()
    if debug:
        os.environ["COMPOSE_DEBUG"] = "1"
    if no_plugin or strict_plugins:
        from composeformer.plugins import configure

        configure(blocked=no_plugin, strict=strict_plugins)


def main() -> NoReturn:
    """Runs the command line and exits; no traceback reaches a user without --debug."""
    try:
        code = compose.main(standalone_mode=False, prog_name="compose")
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("compose: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    from composeformer.errors import ComposeError

    if isinstance(error, ComposeError):
        for line in error.lines:
            click.echo(f"compose: {line}", err=True)
        sys.exit(error.exit_code)
    if os.environ.get("COMPOSE_DEBUG"):
        raise error
    told = " ".join(str(error).split())[:500]
    click.echo(
        f"compose: internal error: {type(error).__name__}: {told} (--debug shows the traceback)", err=True
    )
    sys.exit(70)


def _plain_logging() -> None:
    """Warnings of ours go to stderr, one line each."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("compose: %(message)s"))
    logger = logging.getLogger("composeformer")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
