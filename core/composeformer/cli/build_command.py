"""`compose build`: assemble a model; its tree, parameters, memory and cost; with -o a model folder."""

from pathlib import Path
from time import perf_counter
from typing import Any

import click

from composeformer.cli.options import (
    SPEC,
    SPEC_HELP,
    console,
    device_options,
    json_option,
    print_json,
    progress,
    set_option,
    size,
)


@click.command("build", help=f"Assemble a model with initial values. {SPEC_HELP}")
@click.argument("spec", type=SPEC)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write a model folder here.")
@set_option
@device_options
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the initial values."
)
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
@json_option
def command(
    spec: str,
    output: Path | None,
    settings: tuple[str, ...],
    device: str,
    dtype: str | None,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    from composeformer.costs import cost
    from composeformer.errors import FolderError, InputError
    from composeformer.spec import Spec

    found = Spec.load(spec, settings)
    if output is not None and device == "meta":
        raise InputError("-o needs values, and the device meta has none")
    if output is not None and output.exists() and not force:
        raise FolderError(f"{output}: exists already; --force replaces a model folder")

    from composeformer.assemble import build

    started = perf_counter()
    with progress("initial values") as advance:
        model = build(found, device=device, dtype=dtype, seed=seed, progress=advance)
    seconds = perf_counter() - started
    dialect = None
    if output is not None:
        from composeformer.store import save

        with progress("writing") as advance:
            dialect = save(model, output, replace=force, progress=advance)
    from composeformer.parallel.pieces import local

    held = {id(tensor): local(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    memory, processes = sum(tensor.nbytes for tensor in held.values()), model.placement.world.size
    counts = cost(model.spec)
    if as_json:
        from composeformer.cli.tree import json_tree

        document: dict[str, Any] = json_tree(model.spec, model.choices)
        document |= {
            "cost": counts.to_dict(),
            "weight_bytes": memory,
            "processes": processes,
            "device": device,
            "seed": seed,
            "seconds": seconds,
        }
        document["folder"] = None if output is None else {"path": str(output), "dialect": dialect}
        print_json(document)
        return
    from composeformer.cli.cost_command import cost_table
    from composeformer.cli.tree import rich_tree

    screen = console()
    screen.print(rich_tree(model.spec, model.choices))
    screen.print(cost_table(counts))
    where = device if processes == 1 else f"{device} in the first of {processes} processes"
    screen.print(f"weights: {size(memory)} on {where}, assembled in {seconds:.2f} s")
    if output is not None:
        named = (
            "names of its own: no dialect expresses this model"
            if dialect == "native"
            else f"the names of {dialect}"
        )
        screen.print(f"wrote {output}, tensors under {named}")
