"""`compose verify`: two models compared, the first difference named. Exit 1 where they differ."""

from math import isfinite
from pathlib import Path
from typing import Any

import click

from composeformer.cli.options import console, json_option, one_process, plural, print_json, progress


def _finite(_: click.Context, __: click.Parameter, value: float) -> float:
    if not isfinite(value):
        raise click.BadParameter(f"{value} is no finite number.")
    return value


@click.command(
    "verify", help="Compare FOLDER with a trusted folder: structure, tensors, every component's output."
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), required=True, help="The trusted folder or GGUF file."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-5,
    show_default=True,
    callback=_finite,
    help="Largest max|a-b| / max|b|.",
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Length of the rows compared."
)
@click.option(
    "--bisect", is_flag=True, help="Where they differ, try known conventions until they explain it."
)
@click.option("--hashes", is_flag=True, help="Also read every file against its manifest.")
@json_option
def command(
    folder: Path, against: Path, tolerance: float, tokens: int, bisect: bool, hashes: bool, as_json: bool
) -> int:
    from composeformer.store import verify
    from composeformer.store.loading import like, open_any

    one_process()
    with progress("loading") as advance:
        ours = open_any(folder, check_hashes=hashes, progress=advance)
        theirs = open_any(against, weights=like(ours), check_hashes=hashes, progress=advance)
    verdict = verify(ours, theirs, tolerance=tolerance, tokens=tokens, bisect=bisect)
    if as_json:
        print_json(verdict.to_dict())
    else:
        _print(verdict, str(folder), str(against))
    return 0 if verdict.equal else 1


def _print(verdict: Any, ours: str, theirs: str) -> None:
    screen = console()
    for line in verdict.structure[:20]:
        screen.print(f"structure: {line}", markup=False)
    for found in verdict.tensors[:20]:
        gap = found.detail or f"differs by {found.relative:.3g} of its largest value"
        screen.print(f"tensor {found.where}: {gap}", markup=False)
    if len(verdict.tensors) > 20:
        screen.print(f"... {plural(len(verdict.tensors), 'tensor')} differ")
    first = verdict.first
    if first is not None:
        gap = first.detail or f"differs by {first.relative:.3g}, more than {verdict.tolerance:g}"
        screen.print(f"first difference: the output of {first.where} {gap}", markup=False)
    if verdict.explanation is not None:
        for line in verdict.explanation.lines:
            screen.print(f"bisect: {line}", markup=False)
    elif first is not None:
        screen.print("--bisect searches for the conventions that explain it", markup=False)
    told = "equal" if verdict.equal else "NOT equal"
    over = plural(verdict.tokens, "token")
    logits = "" if verdict.logits is None else f"; logits differ by {verdict.logits:.3g} over {over}"
    screen.print(f"{ours} and {theirs} are {told}{logits}", markup=False)
