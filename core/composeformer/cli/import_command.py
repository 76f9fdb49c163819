"""`compose import`: a Hugging Face folder or a GGUF file becomes a model folder."""

from pathlib import Path

import click

from composeformer.cli.options import json_option, one_process, print_json, progress
from composeformer.cli.streams import visible


@click.command("import", help="SOURCE, a Hugging Face folder or a GGUF file, becomes a model folder.")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Write the model folder here."
)
@click.option(
    "--weights",
    type=click.Choice(["keep", "bfloat16", "float32"]),
    help="What becomes of weights that are stored as codes (FP8): kept, or decoded to a dtype; bfloat16 by default.",
)
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
@json_option
def command(source: Path, output: Path, weights: str | None, force: bool, as_json: bool) -> None:
    from composeformer.errors import FolderError

    one_process()
    if output.exists() and not force:
        raise FolderError(f"{output}: exists already; --force replaces a model folder")
    from composeformer.costs import cost
    from composeformer.store import import_model

    with progress("importing") as advance:
        spec = import_model(source, output, weights=weights, replace=force, progress=advance)
    total = cost(spec).total
    if as_json:
        print_json(
            {"folder": str(output), "name": spec.name, "fingerprint": spec.fingerprint, "parameters": total}
        )
    else:
        click.echo(
            visible(f"{output}: {spec.name}, {total:,} parameters, fingerprint {spec.fingerprint[:12]}")
        )
