"""`compose plugins check`: a plugin's components tried against the laws of their slots. Exit 1 where one is broken."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan
from tempfile import TemporaryDirectory
from typing import Any

import click

from composeformer.cli.options import console, json_option, plural, print_json, progress


def _number(_: click.Context, __: click.Parameter, value: float) -> float:
    if isnan(value):
        raise click.BadParameter("nan is not in the range x>0.")
    return value


@click.command("check", help="Try every law on every component of PLUGIN, and print its certificate.")
@click.argument("plugin")
@click.option("--law", "only", help="This law alone, as slot.name.")
@click.option("--slot", help="The components of this slot alone.")
@click.option("--examples", type=click.IntRange(min=1), help="Cases of each law; its own number by default.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all cases.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    callback=_number,
    help="Seconds that a law may take before it counts as broken.",
)
@json_option
def command(
    plugin: str,
    only: str | None,
    slot: str | None,
    examples: int | None,
    seed: int,
    timeout: float,
    as_json: bool,
) -> int:
    from composeformer.errors import InputError, MissingExtra, one_of

    try:
        import hypothesis  # noqa: F401
    except ImportError:
        raise MissingExtra("hypothesis", "laws", "trying laws") from None
    from composeformer.testing.certificate import Certificate, trials
    from composeformer.testing.foreign import DIALECT, NAMES, dialect_findings
    from composeformer.testing.guard import guarded
    from composeformer.testing.models import Models, models
    from composeformer.testing.subject import Subject, subjects

    brought = list(subjects(plugin))
    every: list[Subject | Models] = [*brought, *models(plugin)]
    tried = [each for each in every if slot in (None, each.slot)]
    to_try = [] if only == NAMES else trials(tried, only)
    findings = []
    with _nothing_left(), progress("laws") as advance:
        for finding in guarded(to_try, examples=examples, seed=seed, patience=timeout):
            findings.append(finding)
            advance(len(findings), len(to_try))
    if only in (None, NAMES) and slot in (None, DIALECT):
        findings += dialect_findings(plugin)
    if not findings:
        slots = one_of(dict.fromkeys(each.slot for each in brought))
        raise InputError(f"{plugin}: no law was tried; its components are of {slots}")
    certificate = Certificate(findings=tuple(findings))
    if as_json:
        print_json({"plugin": plugin, **certificate.to_dict()})
    else:
        _print(plugin, certificate)
    return 1 if certificate.broken else 0


@contextmanager
def _nothing_left() -> Iterator[None]:
    """What hypothesis keeps is kept where the user says, or not at all: a report leaves no folder behind."""
    from hypothesis.configuration import set_hypothesis_home_dir

    if "HYPOTHESIS_STORAGE_DIRECTORY" in os.environ:
        yield
        return
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)


def _print(plugin: str, certificate: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    screen = console()
    parts: dict[tuple[str, str], list[Any]] = {}
    for each in certificate.findings:
        parts.setdefault((each.slot, each.kind), []).append(each)
    for (slot, kind), findings in parts.items():
        table = Table(title=f"{slot} {kind}", title_justify="left")
        for column in ("law", "implementation", "verdict", "cases", "worst error", "its bound", "seed"):
            table.add_column(column, overflow="fold")
        for each in findings:
            exact = each.bound == 0
            verdict = f"[red]{each.verdict}[/]" if not each.held else escape(each.verdict)
            error, bound = ("", "exact") if exact else (f"{each.error:.2g}", f"{each.bound:.2g}")
            if each.verdict == "does not apply":
                error, bound = "", escape(each.why)
            row = (each.law, each.implementation, verdict, str(each.cases), error, bound, str(each.seed))
            table.add_row(*row)
        screen.print(table)
    for each in certificate.broken:
        screen.print(f"\n{each}", markup=False, highlight=False, soft_wrap=True)
    if certificate.broken:
        screen.print(f"{plugin}: {plural(len(certificate.broken), 'law')} broken", markup=False)
    else:
        cases = sum(each.cases for each in certificate.findings)
        screen.print(f"{plugin}: all laws hold, in {plural(cases, 'case')}", markup=False)
