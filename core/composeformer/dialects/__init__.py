"""Dialects: how another ecosystem names the same models. One TOML file each, the only home of foreign names.

The same lines read and write. A file has these tables:

- `name`, `source` ("huggingface" or "gguf"), `model_type`, `architectures`; `ignore`: keys that can not
  change what is computed. Any other key without a line is refused by name.
- `[config]`: `their_key = { ours, name, also, default, null, absent, values, require, when, write, ... }`. `ours`
  is a path, or several that share the value. `default` is the class default, `"= EXPRESSION"` where it follows
  from other names. `null = "default"`, `"absent"` or `"= EXPRESSION"` says what a null means, `absent = 0` that
  this value of theirs is none. `write = "changed"` leaves a default unsaid, `"never"` the key. `refuse = "WHY"`
  refuses whatever is stated, `stored = "START"` believes the key only where tensors begin so. `lines.Key` says
  it in full. Keys of the rotary table are named `"rope_parameters.KEY"` and read in both spellings.
- `[shapes]`: the same, read from a tensor: `shape = 0` is its first dimension, `"exists"` or `"missing"`
  whether it is there.
- `[factors]`: rotary parameters known only by the numbers they give, in a tensor.
- `[ours]`: what the family fixes: `"mixer.kind" = "gqa"`, or `[{ value, when }]`.
- `[patterns.NAME]`: which layers differ, as `list`, `first`, `beyond`, `every`, `indices`, `all_but`, `all` say it.
  A line whose `when` speaks of NAME holds in those layers.
- `[[refuse]]`: `{ when, layer, why }`, what can not be together.
- `tensors`: lines as `lines.TensorLine` describes them; sizes and numbers are expressions of names.

How weights are stored as codes, and what `quantization_config` says of it, is no matter of a family: a file with a
`codec` in place of a `model_type` tells it once for all of them (`coding`).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from composeformer.dialects.coding import is_coding
from composeformer.dialects.dialect import Dialect
from composeformer.dialects.rules import Transfer
from composeformer.errors import DialectError, nearest, one_of, show
from composeformer.plugins import Plugins, current
from composeformer.spec import Spec

__all__ = ["Dialect", "Transfer", "expressing", "find", "load_all"]

log = logging.getLogger(__name__)


def load_all() -> tuple[Dialect, ...]:
    """The dialects of all plugins. One that can not be read is reported and left out."""
    return tuple(_each(current()))


def _each(plugins: Plugins) -> Iterator[Dialect]:
    """The same, each read when it is reached."""
    found = (_read(plugins, place) for place in range(len(plugins.dialect_files)))
    return (dialect for dialect in found if dialect is not None)


@cache
def _read(plugins: Plugins, place: int) -> Dialect | None:
    file = plugins.dialect_files[place]
    try:
        text = file.read_text(encoding="utf-8")
        return None if is_coding(text) else Dialect(text, file.name)
    except (DialectError, OSError, UnicodeDecodeError) as error:
        log.warning("dialect %s is left out: %s", file.name, error)
        return None


def find(config: Mapping[str, Any]) -> Dialect:
    """The dialect of a config, or of a GGUF file's metadata. Raises DialectError where none is installed."""
    dialects = load_all()
    for dialect in dialects:
        if dialect.matches(config):
            return dialect
    gguf = "general.architecture" in config
    key = "general.architecture" if gguf else "model_type"
    names = [d.model_type for d in dialects if (d.source == "gguf") == gguf]
    stated = config.get(key)
    near = nearest(stated, names) if isinstance(stated, str) else None
    hint = f"; did you mean {near!r}?" if near else ""
    raise DialectError(f"{key} = {show(stated)}: no dialect reads this; allowed: {one_of(names)}{hint}")


def expressing(spec: Spec, first: str | None = None) -> tuple[Dialect, dict[str, Any]]:
    """The first dialect that can express a spec, with its config; the one named `first` is asked before the others.

    Raises DialectError with the reasons of those that come nearest, and the others' names.
    """
    reasons: dict[str, Sequence[str]] = {}
    asked = _each(current()) if first is None else sorted(load_all(), key=lambda each: each.name != first)
    for dialect in asked:
        if dialect.source == "huggingface":
            try:
                return dialect, dialect.to_config(spec)
            except DialectError as error:
                reasons[dialect.name] = error.lines
    if not reasons:
        raise DialectError("no dialect is installed")
    fewest = min(map(len, reasons.values()))
    near = [name for name, lines in reasons.items() if name == first or len(lines) == fewest]
    others = [name for name in reasons if name not in near]
    told = [f"{name}: {line}" for name in near for line in reasons[name]]
    raise DialectError(*told, *([f"{', '.join(others)}: further from it"] if others else []))
