"""How one document changes another: the single rule behind `extends`, `--set` and changes made in Python.

Tables merge key by key; arrays and plain values are replaced. A table that names another part than before, by
`kind` or by `use`, is replaced whole: the keys around the old name configured the old part.
"""

from collections.abc import Mapping

from composeformer.errors import Source
from composeformer.spec.document import Document, places
from composeformer.spec.scanner import Path

NAMING = ("kind", "use")


def merge(base: Document, over: Document) -> Document:
    """`base` changed by `over`: a new document of `over`'s name; each value keeps its source."""
    sources: dict[Path, Source] = {}
    root = over.source(())
    if root is not None:
        sources[()] = root
    data = _tables(base, base.data, over, over.data, (), sources)
    return Document(data, sources, over.name)


def combine(
    base: Document, below: object, over: Document, above: object, path: Path, sources: dict[Path, Source]
) -> object:
    """What stands at `path` once `above`, from `over`, changes `below`, from `base`.

    `sources` gains the places in it.
    """
    if isinstance(below, dict) and isinstance(above, dict) and not (path and names_another(below, above)):
        return _tables(base, below, over, above, path, sources)
    return copied(over, above, path, sources)


def copied(document: Document, value: object, path: Path, sources: dict[Path, Source]) -> object:
    """A copy of a document's value at `path`; `sources` gains the places in it."""
    for place in places(value, path):
        source = document.source(place)
        if source is not None:
            sources[place] = source
    return _copy(value)


def _tables(
    base: Document,
    below: dict[str, object],
    over: Document,
    above: dict[str, object],
    path: Path,
    sources: dict[Path, Source],
) -> dict[str, object]:
    merged: dict[str, object] = {}
    for key in [*below, *(key for key in above if key not in below)]:
        here = (*path, key)
        document = over if key in above else base
        source = document.source(here)
        if source is not None:
            sources[here] = source
        if key in below and key in above:
            merged[key] = combine(base, below[key], over, above[key], here, sources)
        else:
            merged[key] = copied(document, (above if key in above else below)[key], here, sources)
    return merged


def merged_tables(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """The same rule for plain tables, without sources; values are shared, not copied."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        tables = isinstance(old, dict) and isinstance(value, dict) and not names_another(old, value)
        merged[key] = merged_tables(old, value) if tables else value  # type: ignore[arg-type]
    return merged


def names_another(below: Mapping[str, object], above: Mapping[str, object]) -> bool:
    """Whether a table that changes another says that it is another part."""
    before, after = ({name: table[name] for name in NAMING if name in table} for table in (below, above))
    return bool(before and after) and any(before.get(name) != value for name, value in after.items())


def _copy(value: object) -> object:
    if isinstance(value, dict):
        return {key: _copy(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_copy(below) for below in value]
    return value
