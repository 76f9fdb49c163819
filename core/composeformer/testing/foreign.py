"""A law of the dialects that a plugin ships, which are files and no components: every name of ours is something's."""

import time
from collections.abc import Iterator

from composeformer.dialects.checking import check
from composeformer.testing.certificate import Finding
from composeformer.testing.subject import plugins_named

DIALECT, NAMES = "dialect", "dialect.names"
TOLD = "every kind, field and tensor of ours that a dialect names is there, and its class defaults go both ways"


def dialect_findings(plugin: str | None = None) -> Iterator[Finding]:
    """What is found of each dialect file of a plugin, or of all. Raises InputError for a plugin that is not loaded."""
    for info in plugins_named(plugin):
        for file in info.dialects:
            begun = time.monotonic()
            try:
                checked = check(file.read_text(encoding="utf-8"), file.name)
                slips, untried = checked.slips, checked.untried
            except (OSError, UnicodeDecodeError) as error:
                slips, untried = (f"{file.name}: {error}",), ""
            yield Finding(
                law=NAMES,
                told=TOLD,
                slot=DIALECT,
                kind=file.name,
                implementation="read" if untried else "read and written",
                verdict="broken" if slips else "held",
                cases=1,
                error=0.0,
                bound=0.0,
                seed=0,
                seconds=time.monotonic() - begun,
                why="; ".join(slips) or (f"untried: {untried}" if untried else ""),
            )
