"""`compose check`: validate specs and nothing else."""

import click

from composeformer.cli.options import SPEC_HELP, json_option, print_json, set_option
from composeformer.errors import ComposeError, SpecError


@click.command("check", help=f"Validate specs and nothing else. {SPEC_HELP}")
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...")
@set_option
@json_option
def command(specs: tuple[str, ...], settings: tuple[str, ...], as_json: bool) -> int:
    from composeformer.spec import Spec

    found = []
    failed = False
    for ref in specs:
        try:
            spec = Spec.load(ref, settings)
        except ComposeError as error:
            failed = True
            found.append({"spec": ref, "valid": False, "problems": list(error.lines)})
            if not as_json:
                for line in error.lines:
                    click.echo(f"compose: {line}", err=True)
                if isinstance(error, SpecError) and len(error.lines) > 1:
                    click.echo(f"compose: {ref}: {len(error.lines)} problems", err=True)
        else:
            found.append({"spec": ref, "valid": True, "name": spec.name, "fingerprint": spec.fingerprint})
            if not as_json:
                click.echo(f"{ref}: valid ({spec.name}, {len(spec.layers)} layers, {spec.fingerprint[:12]})")
    if as_json:
        print_json({"specs": found})
    return 2 if failed else 0
