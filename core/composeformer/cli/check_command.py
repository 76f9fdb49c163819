"""`compose check`: validate specs and nothing else."""

import click

from composeformer.cli.options import SPEC, SPEC_HELP, json_option, plural, print_json, set_option
from composeformer.cli.streams import say, visible
from composeformer.errors import ComposeError, SpecError


@click.command("check", help=f"Validate specs and nothing else. {SPEC_HELP}")
@click.argument("specs", type=SPEC, nargs=-1, required=True, metavar="SPEC...")
@set_option
@json_option
def command(specs: tuple[str, ...], settings: tuple[str, ...], as_json: bool) -> int:
    from composeformer.cli.running import told
    from composeformer.spec import Spec

    found = []
    failed = False
    for ref in specs:
        try:
            spec = Spec.load(ref, settings)
        except (ComposeError, OSError) as error:
            failed = True
            lines = error.lines if isinstance(error, ComposeError) else (told(error),)
            found.append({"spec": ref, "valid": False, "problems": list(lines)})
            if not as_json:
                for line in lines:
                    say(line)
                if isinstance(error, SpecError) and len(lines) > 1:
                    say(f"{ref}: {len(lines)} problems")
        else:
            found.append({"spec": ref, "valid": True, "name": spec.name, "fingerprint": spec.fingerprint})
            if not as_json:
                layers = plural(len(spec.layers), "layer")
                click.echo(visible(f"{ref}: valid ({spec.name}, {layers}, {spec.fingerprint[:12]})"))
    if as_json:
        print_json({"specs": found})
    return 2 if failed else 0
