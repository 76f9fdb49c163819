"""`compose resize`: change a part, hold a quantity; the new spec in TOML."""

from pathlib import Path
from typing import Any

import click

from composeformer.cli.options import SPEC, SPEC_HELP, console, json_option, print_json, set_option


@click.command(
    "resize", help=f"Swap parts, and solve widths so that a quantity stays what it was. {SPEC_HELP}"
)
@click.argument("spec", type=SPEC)
@set_option
@click.option(
    "--swap", "swaps", multiple=True, metavar="SLOT=FILE.toml", help="Tables that replace a slot's."
)
@click.option("--hold", default="active", show_default=True, help="active, total, flops, cache or cost.")
@click.option(
    "--solve", multiple=True, metavar="PATH", help="A width to solve; those of feed-forward parts by default."
)
@click.option(
    "--multiple", type=click.IntRange(min=1), help="What widths are multiples of; as before by default."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the new spec here; stdout by default."
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@json_option
def command(
    spec: str,
    settings: tuple[str, ...],
    swaps: tuple[str, ...],
    hold: str,
    solve: tuple[str, ...],
    multiple: int | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    from composeformer.costs.resizing import read_swap, resize
    from composeformer.errors import InputError
    from composeformer.spec import Spec

    if output is not None and output.exists() and not force:
        raise InputError(f"{output}: exists already; --force replaces it")
    tables: dict[str, Any] = {}
    for each in swaps:
        tables |= read_swap(each)
    # Settings are of the new architecture: what is held is the old one's. A price is of both.
    paths = {each: each.partition("=")[0].strip() for each in settings}
    before = Spec.load(
        spec, [each for each, path in paths.items() if path == "cost" or path.startswith("cost.")]
    )
    found = resize(before, swaps=tables, hold=hold, solve=solve, multiple=multiple, settings=settings)
    if output is not None:
        output.write_text(found.spec.to_toml(), encoding="utf-8")
    if as_json:
        print_json(found.to_dict())
        return
    if output is None:
        click.echo(found.spec.to_toml(), nl=False)
    screen = console(stderr=output is None)
    for path, (old, new) in found.widths.items():
        screen.print(f"{path}: {old:,} becomes {new:,}", markup=False)
    told = f"{found.told}: {found.wanted:,.0f} before, {found.found:,.0f} now ({100 * found.deviation:+.3f}%)"
    screen.print(told, markup=False)
