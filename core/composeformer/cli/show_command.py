"""`compose show`: the component tree, the format of every role, and where each value comes from."""

from typing import Any

import attrs
import click

from composeformer.cli.options import SPEC, SPEC_HELP, console, json_option, print_json, set_option


@click.command(
    "show",
    help=f"The component tree, implementation rules, precision by role. {SPEC_HELP} A model folder serves too.",
)
@click.argument("spec", type=SPEC)
@set_option
@click.option(
    "--values", is_flag=True, help="Every value with where it came from: file and line, --set, or default."
)
@json_option
def command(spec: str, settings: tuple[str, ...], values: bool, as_json: bool) -> None:
    from composeformer.cli.tree import json_tree, rich_tree
    from composeformer.spec import Spec

    found = Spec.load(spec, settings)
    if as_json:
        document = json_tree(found)
        document["precision"] = [
            {"roles": roles, "count": count, **attrs.asdict(form)}
            for (roles, form), count in precision(found).items()
        ]
        if values:
            document["values"] = [{"path": p, "value": v, "source": str(s)} for p, v, s in found.values()]
        print_json(document)
        return
    screen = console()
    if values:
        screen.print(_values(found))
        return
    screen.print(rich_tree(found))
    screen.print(_precision(found))


def precision(spec: Any) -> dict[tuple[str, Any], int]:
    """How many tensors have a name, layer numbers a star, and a format; one that is alone keeps its number."""
    from composeformer.precision import starred

    rows: dict[tuple[str, Any], list[str]] = {}
    for name, form in (*spec.formats.tensors.items(), *spec.formats.shared.items()):
        rows.setdefault((starred(name), form), []).append(name)
    return {(roles if names[1:] else names[0], form): len(names) for (roles, form), names in rows.items()}


def stored(form: Any) -> str:
    """How a tensor is stored, in words."""
    return str(form.storage) if form.codec is None else f"{form.storage} by {form.codec}"


def scaled(form: Any) -> str:
    """What shares a scale, in words."""
    if form.block is None:
        return ""
    rows, columns = (size or "all" for size in form.block)
    return f"{rows} x {columns}"


def _precision(spec: Any) -> Any:
    from rich.table import Table

    table = Table(title=f"precision: {spec.single('precision').kind}", title_justify="left")
    for column in ("tensors", "", "stored", "computed", "scales", "moments", "why"):
        table.add_column(column, justify="right" if not column else "left", no_wrap=column == "tensors")
    for (roles, form), count in precision(spec).items():
        moments = form.moment if form.codec is None else ""
        computed = form.compute.removeprefix("float8_") if form.compute != form.storage else ""
        table.add_row(roles, str(count), stored(form), computed, scaled(form), moments, form.why)
    return table


def _values(spec: Any) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from composeformer.errors import show

    table = Table(title=f"{spec.name}: values", title_justify="left")
    for column in ("path", "value", "from"):
        table.add_column(column, overflow="fold")
    for path, value, source in spec.values():
        mark = " (unverified)" if path in spec.unverified else ""
        table.add_row(escape(path), escape(show(value)), escape(f"{source}{mark}"))
    return table
