"""`compose cost`: what a spec is and needs, without torch."""

from typing import Any

import click

from composeformer.cli.options import SPEC, SPEC_HELP, big, console, json_option, print_json, set_option


@click.command("cost", help=f"Parameters, cache and floating-point operations. {SPEC_HELP}")
@click.argument("spec", type=SPEC)
@set_option
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Sequence length for FLOPs; 4096 or the model's longest by default.",
)
@json_option
def command(spec: str, settings: tuple[str, ...], context: int | None, as_json: bool) -> None:
    from composeformer.costs import checkpoint, cost
    from composeformer.spec import Spec

    loaded = Spec.load(spec, settings)
    counts, folder = cost(loaded, context=context), checkpoint(loaded)
    if as_json:
        print_json({**counts.to_dict(), "checkpoint": folder.to_dict()})
    else:
        console().print(cost_table(counts, folder))


def cost_table(counts: Any, folder: Any = None) -> Any:
    """The counts as a rich table, every number with its definition; with those of its `folder` where given."""
    from rich.table import Table

    table = Table(title=f"{counts.name}: cost", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("parameters", f"{counts.total:,}", "tied matrices once; buffers and predictor apart")
    for slot, count in counts.by_slot.items():
        table.add_row(f"  {slot}", f"{count:,}", f"{100 * count / counts.total:.1f}%")
    if counts.predictor:
        table.add_row("predictor", f"{counts.predictor:,}", "beside the total")
    for name, count in counts.buffers.items():
        table.add_row(f"buffer {name}", f"{count:,}", "saved, not trained")
    active = counts.active
    table.add_row("active", f"{active.with_embeddings:,}", "with both embeddings")
    table.add_row("", f"{active.without_input_embedding:,}", "without the input embedding")
    table.add_row("", f"{active.without_embeddings:,}", "without embeddings")
    table.add_row("cache per token", f"{counts.cache_bytes_per_token:,} B", "at two bytes an element")
    at = f"one sequence of {counts.flops_per_token.context:,} tokens; windows hold their width"
    table.add_row("", f"{counts.cache_bytes_at_context:,} B", at)
    flops = counts.flops_per_token
    table.add_row(
        "FLOPs per token", big(flops.forward), f"forward, {flops.convention}, context {flops.context:,}"
    )
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
            "unverified", str(len(counts.unverified)), "without a source: " + ", ".join(counts.unverified)
        )
    return table
