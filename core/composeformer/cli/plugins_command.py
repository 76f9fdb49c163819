"""`compose plugins`: what is installed, from where; what a plugin brings; why one is not loaded; `new` and `check`."""

from typing import Any

import click

from composeformer import lazy
from composeformer.cli.options import console, json_option, print_json
from composeformer.discovery import canonical
from composeformer.errors import InputError, nearest, one_of
from composeformer.hookspecs import API_VERSION


@click.group(
    "plugins",
    invoke_without_command=True,
    help="What is installed, from where, and why a plugin is not loaded; start one, prove one.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_command, as_json=as_json)
    elif as_json:
        raise click.UsageError(f"--json goes after {ctx.invoked_subcommand}")


# By name: laws need torch, as listing plugins does not.
for subcommand in ("new", "check"):
    command.add_command(lazy.load(f"composeformer.cli.plugins_{subcommand}_command:command"))


@command.command("list", help="Every plugin: distribution, version, status, cause.")
@json_option
def list_command(as_json: bool = False) -> None:
    from composeformer.plugins import current

    plugins = current()
    if as_json:
        infos = [_document(info) for info in plugins.infos]
        print_json({"api_version": API_VERSION, "digest": plugins.digest(), "plugins": infos})
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("plugin", "distribution", "version", "status", "components"):
        table.add_column(column, overflow="fold")
    for info in plugins.infos:
        brings = ", ".join(f"{c.slot} {c.kind}" for c in info.components)
        status = info.status if not info.cause else f"{info.status}: {info.cause}"
        status += "".join(f"; {conflict}" for conflict in info.conflicts)
        table.add_row(info.name, info.distribution, info.version or "?", escape(status), brings)
    console().print(table)


@command.command("info", help="One plugin: its components with their fields and implementations.")
@click.argument("name")
@json_option
def info_command(name: str, as_json: bool) -> None:
    from composeformer.plugins import current

    infos = current().infos
    asked = canonical(name)
    named = [info for info in infos if asked == canonical(info.name)]
    found = named or [info for info in infos if asked in (canonical(info.distribution), canonical(info.selector))]
    if not found:
        names = dict.fromkeys(known for info in infos for known in (info.name, info.distribution))
        near = nearest(name, names)
        hint = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"{name}: no plugin has this name; installed: {one_of(i.name for i in infos)}{hint}")
    if len(found) > 1:
        raise InputError(f"{name}: has several plugins: {one_of(info.selector for info in found)}")
    if as_json:
        print_json(_document(found[0], fields=True))
        return
    _print_info(found[0])


def _document(info: Any, fields: bool = False) -> dict[str, Any]:
    from composeformer.config import describe, facts_of

    components = []
    for component in info.components:
        entry: dict[str, Any] = {
            "slot": component.slot,
            "kind": component.kind,
            "summary": component.summary,
            "revision": component.revision,
            "default": component.default,
        }
        if fields:
            entry["implementations"] = [
                {"name": i.name, "phases": list(i.phases)} for i in component.implementations
            ]
            entry["claims"] = list(component.claims)
            entry["fields"] = {
                name: {
                    "allowed": describe(f),
                    "required": f.required,
                    "default": f.default,
                    "affects": f.affects,
                    "help": f.help,
                }
                for name, f in facts_of(component.config).items()
            }
        components.append(entry)
    return {
        "name": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "requires": info.requires,
        "origin": info.origin,
        "status": info.status,
        "cause": info.cause,
        "conflicts": list(info.conflicts),
        "components": components,
        "dialects": [str(getattr(path, "name", path)) for path in info.dialects],
        "specs": [str(getattr(path, "name", path)) for path in info.specs],
        "topologies": [str(getattr(path, "name", path)) for path in info.topologies],
        "hardware": [str(getattr(path, "name", path)) for path in info.hardware],
    }


def _print_info(info: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    from composeformer.config import describe, facts_of
    from composeformer.errors import show

    screen = console()
    screen.print(
        f"[bold]{info.name}[/] {info.distribution} {info.version} ({info.status}) {escape(str(info.origin))}"
    )
    if info.cause:
        screen.print(escape(info.cause))
    for component in info.components:
        names = ", ".join(i.name for i in component.implementations)
        title = f"{component.slot} {component.kind}: {component.summary} [{names}]"
        table = Table(title=escape(title), title_justify="left")
        for column in ("field", "allowed", "default", "meaning"):
            table.add_column(column, overflow="fold")
        for name, facts in facts_of(component.config).items():
            only = "the only one of its slot" if facts.slot else "required"
            default = only if facts.required else "absent" if facts.default is None else show(facts.default)
            table.add_row(name, escape(describe(facts)), escape(default), escape(facts.help))
        screen.print(table)
