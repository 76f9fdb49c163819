"""`compose show`: the component tree, the format of every role, and where each value comes from."""

from typing import Any

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
            {"roles": role, "count": count, "format": format_, "why": why}
            for role, count, format_, why in precision(found)
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


def precision(spec: Any) -> list[tuple[str, int, str, str]]:
    """Tensors by role pattern: how many, in which format, and why; layer numbers become a star."""
    from composeformer.precision import starred

    rows: dict[tuple[str, str, str], int] = {}
    for name, form in spec.formats.tensors.items():
        key = (starred(name), told(form), form.why)
        rows[key] = rows.get(key, 0) + 1
    return [(pattern, count, text, why) for (pattern, text, why), count in rows.items()]


def told(form: Any) -> str:
    """A format in words: how it is stored, multiplied and scaled."""
    text: str = form.storage
    if form.codec is not None:
        text += f" by {form.codec}"
    if form.compute != form.storage:
        text += f", computed in {form.compute}"
    if form.block is not None:
        rows, columns = (size or "all" for size in form.block)
        text += f", a scale ({form.scale}) for {rows} x {columns}"
    return text + (f", moments in {form.moment}" if form.moment not in (form.storage, "float32") else "")


def _precision(spec: Any) -> Any:
    from rich.table import Table

    table = Table(title=f"precision: {spec.single('precision').kind}", title_justify="left")
    for column in ("tensors", "", "format", "why"):
        table.add_column(column, justify="right" if not column else "left")
    for pattern, count, text, why in precision(spec):
        table.add_row(pattern, str(count), text, why)
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
