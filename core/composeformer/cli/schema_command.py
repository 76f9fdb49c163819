"""`compose schema`: the JSON Schema of specs for the installed plugins."""

from pathlib import Path

import click

from composeformer.cli.options import json_option, print_json
from composeformer.cli.streams import say


@click.command(
    "schema",
    help="JSON Schema (draft 2020-12) of specs, for the installed plugins; editors complete and check with it.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
@json_option
def command(output: Path | None, as_json: bool) -> None:
    import json

    from composeformer.plugins import current
    from composeformer.spec.schema import schema

    document = schema(current().registry)
    if output is None:
        print_json(document)
        return
    output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json({"written": str(output)})
    else:
        say(f"wrote {output}")
