"""What a user is told when something is wrong: where, what was found, what is allowed, the nearest name.

Every error that input can cause is a `ComposeError`; the command line prints its lines and exits with
its `exit_code`. A `Problem` is one finding of a validation; validations gather all of them first.
"""

from collections.abc import Iterable, Sequence

import attrs


@attrs.frozen
class Source:
    """Where a value came from: a file and line, an override, or a default.

    `file` is a path as the user wrote it, or "--set", "python" or "default"; `line` counts from 1.
    """

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


DEFAULT = Source("default")


@attrs.frozen
class Problem:
    """One thing that is wrong: `field = found: allowed`.

    `field` is relative to the part that reports it; whoever gathers problems prefixes the path with
    `under` and adds the `source` with `at`. `found` is None when there is nothing to show.
    """

    field: str
    found: object
    allowed: str
    nearest: str | None = None
    source: Source | None = None

    def under(self, path: str) -> "Problem":
        """The same problem seen from the owner of `path`."""
        return attrs.evolve(self, field=join(path, self.field))

    def at(self, source: Source | None) -> "Problem":
        return attrs.evolve(self, source=source)

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source is not None else ""
        value = "" if self.found is None else f" = {show(self.found)}"
        hint = "" if self.nearest is None else f"; did you mean {self.nearest!r}?"
        return f"{where}{self.field}{value}: {self.allowed}{hint}"


class ComposeError(Exception):
    """Wrong input, told in one line or more. `exit_code` is what the command line returns."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class SpecError(ComposeError):
    """A spec that does not describe a model; carries every problem found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = tuple(problems)
        super().__init__(*(str(problem) for problem in self.problems))


class PluginError(ComposeError):
    """A plugin that could not be used, with its distribution and the cause."""


class FolderError(ComposeError):
    """A model folder or weight file that is missing, damaged or unsafe."""


class DialectError(ComposeError):
    """A foreign model that can not be read, or a model that a dialect can not express."""


class InputError(ComposeError):
    """A prompt, an argument or a call that a built model can not serve."""


class MissingExtra(ComposeError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'composeformer[{extra}]'")


class CheckFailed(ComposeError):
    """A comparison, a law or a diagnosis that came out negative; the input was fine."""

    exit_code = 1


def join(path: str, name: str) -> str:
    """`a` and `b` make `a.b`; an empty side leaves the other."""
    return f"{path}.{name}" if path and name else path or name


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that `name` most likely meant, or None."""
    # Errors are rare and difflib is slow to import.
    from difflib import get_close_matches

    matches = get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def one_of(names: Iterable[str]) -> str:
    """`a, b, c` in the order given, cut after twenty."""
    listed = list(names)
    text = ", ".join(listed[:20]) + (f", ... ({len(listed)} in all)" if len(listed) > 20 else "")
    return text or "none"


def show(value: object) -> str:
    """A value as TOML would write it, cut to one short line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = f'"{value}"' if isinstance(value, str) else str(value)
    except ValueError:  # Python writes out no integer of more than 4300 digits; TOML's 0x... may have more.
        text = "(a number too long to show)"
    # Input may carry escapes that a terminal would obey.
    text = "".join(c if c.isprintable() else "\\" + f"x{ord(c):02x}" for c in " ".join(text.split()))
    return text if len(text) <= 80 else text[:77] + "..."
