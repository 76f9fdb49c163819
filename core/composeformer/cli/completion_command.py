"""`compose completion`: a script that completes commands in a shell."""

import click


@click.command(
    "completion",
    help='A completion script. For bash, put  eval "$(compose completion bash)"  into ~/.bashrc.',
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    from click.shell_completion import get_completion_class

    from composeformer.cli.group import compose

    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(compose, {}, "compose", "_COMPOSE_COMPLETE").source())
