"""`compose cost`: what a spec is and needs, without torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from composeformer.cli.options import (
    SPEC,
    SPEC_HELP,
    big,
    console,
    json_option,
    print_json,
    set_option,
    uncollected,
)


@click.command("cost", help=f"What a spec is, needs and costs, every number with its definition. {SPEC_HELP}")
@click.argument("spec", type=SPEC)
@set_option
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Sequence length for FLOPs; that of [cost], 4096 or the model's longest by default.",
)
@click.option("--markdown", "as_markdown", is_flag=True, help="A Markdown document on stdout.")
@click.option(
    "--html", type=click.Path(path_type=Path), help="Write a page with plots here; it needs nothing else."
)
@click.option(
    "--precisions", is_flag=True, help="The folder's bytes and dtypes in every precision; takes seconds."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws behind ranges."
)
@json_option
def command(
    spec: str,
    settings: tuple[str, ...],
    context: int | None,
    as_markdown: bool,
    html: Path | None,
    precisions: bool,
    seed: int,
    as_json: bool,
) -> None:
    from composeformer.costs.printing import document, markdown
    from composeformer.costs.report import Report
    from composeformer.spec import Spec

    if as_json and as_markdown:
        raise click.UsageError("--json and --markdown are two documents; choose one")
    click.get_current_context().with_resource(uncollected())
    report = Report(Spec.load(spec, settings), context=context, seed=seed, precisions=precisions)
    if html is not None:
        from composeformer.costs.page import page

        html.write_text(page(report), encoding="utf-8")
        if not (as_json or as_markdown):
            click.echo(f"wrote {html}")
            return
    if as_json:
        print_json(document(report))
    elif as_markdown:
        click.echo(markdown(report), nl=False)
    else:
        _print(report)


def _print(report: Any) -> None:
    """Every section as a table, then ranges and what the price depends on most."""
    from rich.markup import escape
    from rich.table import Table

    from composeformer.costs.printing import TREND, layers, money, sensitivity, shown, told, trend

    # What is wrong is told before anything is printed.
    sections, screen = report.sections, console()
    screen.print(cost_table(report.counts, report.folder, layers(report)))
    # What the first table has already is not told again.
    for title, section in list(sections.items())[2:]:
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_column(style="dim", overflow="fold")
        for name, quantity in section.items():
            table.add_row(escape(name), escape(shown(quantity)), escape(told(quantity)))
        screen.print(table)
    if not report.is_priced:
        told_how = "to price a run, state cost.tokens: --set cost.tokens=1e12, or a [cost] table"
        screen.print(told_how, markup=False, style="dim")
        return
    table = Table("scope", "5%", "50%", "95%", title="ranges, never added together", title_justify="left")
    for name, found in report.ranges.items():
        table.add_row(name, money(found.p5), money(found.p50), money(found.p95))
    screen.print(table)
    table = Table("assumption", "90% lie in", "which makes", title="what it depends on", title_justify="left")
    for name in dict.fromkeys(
        (*(swing.name for swing in report.swings if swing.size), *report.sensitivities)
    ):
        assumed = report.assumptions[name]
        table.add_row(name, f"{assumed.low:g} to {assumed.high:g}", sensitivity(report, name))
    screen.print(table)
    table = Table(*TREND, title="the rent of the same run in other years", title_justify="left")
    for row in trend(report):
        table.add_row(*row)
    screen.print(table)
    told_how = "all assumptions with their sources, parameters by role: --markdown or --json"
    screen.print(told_how, markup=False, style="dim")


def cost_table(counts: Any, folder: Any = None, layers: Iterable[tuple[str, str]] = ()) -> Any:
    """The counts as a rich table, every number with its definition; with those of its `folder` and its `layers` where
    given.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{counts.name}: cost"), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("parameters", f"{counts.total:,}", "tied matrices once; buffers and predictor apart")
    for slot, count in counts.by_slot.items():
        table.add_row(f"  {slot}", f"{count:,}", f"{100 * count / counts.total:.1f}%")
    for which, number in layers:
        table.add_row(f"  layer {which}", number, "each")
    if counts.predictor:
        table.add_row("predictor", f"{counts.predictor:,}", "beside the total")
    for name, count in counts.buffers.items():
        table.add_row(f"buffer {name}", f"{count:,}", "saved, not trained")
    active = counts.active
    table.add_row("active", f"{active.with_embeddings:,}", "with both embeddings")
    table.add_row("", f"{active.without_input_embedding:,}", "without the input embedding")
    table.add_row("", f"{active.without_embeddings:,}", "without embeddings")
    if counts.caches_unknown:
        table.add_row("cache", "unknown", escape(f"{', '.join(counts.unknown)}: the plugin does not say"))
    else:
        table.add_row("cache per token", f"{counts.cache_bytes_per_token:,} B", f"at {counts.cached_as}")
        at = f"one sequence of {counts.flops_per_token.context:,} tokens; windows hold their width"
        table.add_row("", f"{counts.cache_bytes_at_context:,} B", at)
    flops = counts.flops_per_token
    told = f"forward, {flops.convention}, context {flops.context:,}"
    table.add_row("FLOPs per token", big(flops.forward), escape(told))
    table.add_row("", big(flops.training), "training: three forwards")
    if counts.predictor:
        table.add_row("", big(flops.training_with_predictor), "training, the predictor included")
    if folder is not None:
        named = "its own" if folder.dialect == "native" else folder.dialect
        told = f"{folder.tensors:,} tensors by {named} names, copies and scales included"
        table.add_row("folder", f"{folder.bytes:,} B", told)
        for dtype, count in folder.by_dtype.items():
            table.add_row(f"  {dtype}", f"{count:,}", f"{100 * count / folder.elements:.1f}% of elements")
    if counts.unverified:
        table.add_row(
            "unverified",
            str(len(counts.unverified)),
            escape("without a source: " + ", ".join(counts.unverified)),
        )
    return table
