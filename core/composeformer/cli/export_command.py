"""`compose export`: a model folder becomes a plain Hugging Face folder."""

from pathlib import Path

import click

from composeformer.cli.options import json_option, one_process, print_json, progress


@click.command(
    "export",
    help="A model folder becomes a plain Hugging Face folder that transformers loads, or is refused with reasons.",
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Write the Hugging Face folder here.",
)
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
@json_option
def command(folder: Path, output: Path, force: bool, as_json: bool) -> None:
    from composeformer.store import export_model

    one_process()
    with progress("exporting") as advance:
        dialect = export_model(folder, output, replace=force, progress=advance)
    if as_json:
        print_json({"folder": str(output), "dialect": dialect})
    else:
        click.echo(f"{output}: a {dialect} folder")
