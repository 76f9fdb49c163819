"""`compose plugins new`: a plugin package that installs with pip and works at once, to start from."""

import click

from composeformer.cli.options import json_option, print_json
from composeformer.cli.streams import visible


@click.command("new", help="Write a plugin package that works at once, to change into your own.")
@click.argument("name")
@click.option("--slot", required=True, help="What its component is: mixer, ffn, router, norm, ...")
@click.option("--kind", default=None, help="What specs call it; by default NAME.")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    default=None,
    metavar="DIR",
    help="The folder to write; by default NAME.",
)
@json_option
def command(name: str, slot: str, kind: str | None, output: str | None, as_json: bool) -> None:
    from composeformer.scaffold import create

    created = create(name, slot, output, kind)
    names = created.names
    if as_json:
        print_json(
            {
                "name": names.distribution,
                "package": names.package,
                "slot": slot,
                "kind": names.kind,
                "folder": str(created.folder),
                "files": list(created.lines),
                "code_lines": created.code_lines,
            }
        )
        return
    from shlex import quote

    lines = [
        f"{created.folder}: the {slot} {names.kind}, {created.code_lines} lines in {names.package}/plugin.py and "
        f"{names.package}/module.py",
        f"  pip install -e {quote(str(created.folder))}",
        f"  compose build {quote(f'{created.folder}/example.toml')}",
        f"  compose plugins check {names.distribution}",
    ]
    for line in lines:
        click.echo(visible(line))
