"""Where the registries of two processes differ, in words. What is compared is `plugins.Plugins.manifest`."""

import json
from collections import Counter
from collections.abc import Sequence

# So many differences are told; who has another environment has them all.
MOST = 10


def in_words(row: str) -> str:
    """A line of a manifest as a user reads it: `mixer mla of composeformer 0.1.0, revision 1`."""
    slot, kind, revision, distribution, version = json.loads(row)
    return f"{slot} {kind} of {distribution} {version or '(no version)'}, revision {revision}"


def differences(held: Sequence[str], wanted: Sequence[str], who: str) -> tuple[str, ...]:
    """A line for each component that `who` lacks of the manifest `wanted`, or has besides; none where equal."""
    mine, theirs = Counter(held), Counter(wanted)
    lines = [f"{who} lacks the {in_words(row)}" for row in (theirs - mine).elements()]
    lines += [f"{who} has besides the {in_words(row)}" for row in (mine - theirs).elements()]
    return cut(lines)


def cut(lines: Sequence[str]) -> tuple[str, ...]:
    """The first of many differences, and how many more there are."""
    if len(lines) <= MOST:
        return tuple(lines)
    return (*lines[:MOST], f"and {len(lines) - MOST} more differences")
