"""The group of all commands and the options before them."""

import logging
import os

import click

from composeformer.cli import COMMANDS
from composeformer.cli.streams import visible


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


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _plain_logging() -> None:
    """Warnings of ours go to stderr, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line("compose: %(message)s"))
    logger = logging.getLogger("composeformer")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
