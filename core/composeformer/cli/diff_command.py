"""`compose diff`: two specs side by side, and why one costs more than the other."""

from pathlib import Path
from typing import Any

import click

from composeformer.cli.options import SPEC, SPEC_HELP, console, json_option, print_json, uncollected


@click.command(
    "diff",
    help=f"What SECOND has that FIRST has not, every number of both, and why one costs more. {SPEC_HELP}",
)
@click.argument("first", type=SPEC)
@click.argument("second", type=SPEC)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Sequence length for FLOPs of both; each one's own by default.",
)
@click.option("--markdown", "as_markdown", is_flag=True, help="A Markdown document on stdout.")
@click.option(
    "--html", type=click.Path(path_type=Path), help="Write a page with plots here; it needs nothing else."
)
@json_option
def command(
    first: str, second: str, context: int | None, as_markdown: bool, html: Path | None, as_json: bool
) -> None:
    from composeformer.costs.difference import Difference
    from composeformer.spec import Spec

    if as_json and as_markdown:
        raise click.UsageError("--json and --markdown are two documents; choose one")
    click.get_current_context().with_resource(uncollected())
    found = Difference(Spec.load(first), Spec.load(second), context=context)
    if html is not None:
        from composeformer.costs.difference_page import difference_page

        html.write_text(difference_page(found), encoding="utf-8")
        if not (as_json or as_markdown):
            click.echo(f"wrote {html}")
            return
    if as_json:
        print_json(found.to_dict())
    elif as_markdown:
        from composeformer.costs.printing import difference_markdown

        click.echo(difference_markdown(found), nl=False)
    else:
        _print(found)


def _print(found: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    from composeformer.costs.printing import SAME, shown

    pairs, factors, screen = found.pairs, found.factors, console()
    names = [escape(each.spec.name) for each in (found.first, found.second)]
    table = Table("", "", *names, title="structure", title_justify="left")
    for change in found.changes:
        table.add_row(change.what, *map(escape, (change.where, change.first, change.second)))
    if found.changes:
        screen.print(table)
    else:
        screen.print(SAME, markup=False)
    for title in dict.fromkeys(pair.section for pair in pairs):
        table = Table("", *names, "ratio", title=title, title_justify="left")
        for pair in pairs:
            if pair.section == title:
                values = ("" if each is None else shown(each) for each in (pair.first, pair.second))
                table.add_row(escape(pair.name), *values, "" if pair.ratio is None else f"{pair.ratio:.3g}")
        screen.print(table)
    if found.hours is None:
        screen.print(
            "to say why one costs more, both need cost.tokens or cost.gpu_hours", markup=False, style="dim"
        )
        return
    table = Table(
        "factor",
        "of device hours",
        "what it is",
        title=f"{found.hours:.2f} times the hours",
        title_justify="left",
    )
    for factor in factors:
        table.add_row(factor.name, f"{factor.value:.3f}", escape(factor.told))
    screen.print(table)
    product = " x ".join(f"{factor.value:.3f}" for factor in factors)
    screen.print(f"{product} = {found.hours:.2f}", markup=False)
