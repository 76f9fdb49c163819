"""`compose doctor`: what this machine offers, and why not. Exit 1 where something needed is missing."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from composeformer.cli.options import console, json_option, print_json

NEEDED = (
    "torch",
    "safetensors",
    "attrs",
    "pluggy",
    "tomli",
    "tomli-w",
    "click",
    "rich",
    "jaxtyping",
    "numpy",
)
EXTRAS = {
    "tokenizers": ("text", "tokenizers of model folders"),
    "jinja2": ("text", "chat templates"),
    "gguf": ("gguf", "importing GGUF files"),
    "triton": ("", "kernels on a GPU; comes with PyTorch's CUDA builds"),
    "transformers": ("test", "parity tests"),
    "hypothesis": ("test", "property tests"),
}


@click.command(
    "doctor", help="Devices, number formats, kernels and extras of this machine, and why one is missing."
)
@json_option
def command(as_json: bool) -> int:
    rows = [*_packages(), *_machine(), *_plugins(), *_profiles()]
    failed = any(status == "missing" for _, status, _ in rows)
    if as_json:
        print_json({"ok": not failed, "checks": [{"what": w, "status": s, "detail": d} for w, s, d in rows]})
        return int(failed)
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="compose doctor", title_justify="left")
    for column in ("what", "status", "detail"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "absent": "dim", "missing": "red", "failed": "yellow"}
    for what, status, detail in rows:
        table.add_row(what, f"[{colours[status]}]{status}[/]", escape(detail))
    console().print(table)
    return int(failed)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> list[tuple[str, str, str]]:
    rows = [("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for package in NEEDED:
        found = _version(package)
        rows.append((package, "ok" if found else "missing", found or f"pip install {package}"))
    for package, (extra, purpose) in EXTRAS.items():
        found = _version(package)
        how = f"pip install 'composeformer[{extra}]' for {purpose}" if extra else purpose
        rows.append((package, "ok" if found else "absent", found or how))
    return rows


def _machine() -> list[tuple[str, str, str]]:
    from composeformer.lazy import available, load

    if not available("torch"):
        return []
    return load("composeformer.machine:probe")()  # type: ignore[no-any-return]


def _plugins() -> list[tuple[str, str, str]]:
    from composeformer.hookspecs import API_RANGE, API_VERSION
    from composeformer.plugins import current

    rows = [("plugin API", "ok", f"{API_VERSION}: a plugin requires composeformer{API_RANGE}")]
    for info in current().infos:
        status = {"loaded": "ok", "blocked": "absent"}.get(info.status, "failed")
        detail: Any = (
            info.cause or f"{len(info.components)} components from {info.distribution} {info.version}"
        )
        rows.append((f"plugin {info.name}", status, "; ".join([detail, *info.conflicts])))
    return rows


def _profiles() -> list[tuple[str, str, str]]:
    """The devices that `[cost]` can be of, and how much of each profile was read at its source."""
    from composeformer.costs import hardware
    from composeformer.costs.quantities import scaled
    from composeformer.errors import ComposeError

    rows = []
    for name in hardware.shipped():
        try:
            found = hardware.load(name)
        except ComposeError as error:
            rows.append((f"profile {name}", "failed", "; ".join(error.lines)))
            continue
        figures = found.figures()
        peak = max(found.peaks.items(), key=lambda each: each[1].value)
        told = f"{found.description}: {scaled(peak[1].value, 'FLOP/s')} in {peak[0]}, {scaled(found.memory.value, 'B')}"
        unread = sum(not figure.read for figure in figures.values())
        rows.append((f"profile {name}", "ok", f"{told}; {unread} of {len(figures)} numbers unconfirmed"))
    return rows
