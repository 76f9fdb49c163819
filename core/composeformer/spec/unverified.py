"""`unverified`: paths of values for which a spec's author found no source.

A mark is about a value as its author wrote it. Whoever overrides the value takes the mark away with it.
"""

from composeformer.errors import nearest
from composeformer.spec.document import Document
from composeformer.spec.resolve import Resolver
from composeformer.spec.scanner import dotted
from composeformer.spec.values import leaves

KEY = "unverified"


def carried(before: Document, after: Document) -> Document:
    """`after` without the marks of `before` on values that are not those of `before` any more."""
    marks = after.data.get(KEY)
    if not isinstance(marks, list) or before.source((KEY,)) != after.source((KEY,)):
        return after
    stated = {path for path, _ in leaves(after.data)}
    paths = {dotted(path): path for path, _ in leaves(before.data)}
    kept = [
        mark
        for mark in marks
        if not isinstance(mark, str)
        or mark not in paths
        or (paths[mark] in stated and before.source(paths[mark]) == after.source(paths[mark]))
    ]
    if len(kept) == len(marks):
        return after
    data = {key: value for key, value in after.data.items() if key != KEY} | ({KEY: kept} if kept else {})
    sources = after.sources if kept else {path: s for path, s in after.sources.items() if path != (KEY,)}
    return Document(data, sources, after.name)


def check_marks(resolver: Resolver) -> None:
    """Notes every mark that is not on a value that the document states."""
    document = resolver.document
    marks = document.data.get(KEY, [])
    if not isinstance(marks, list) or not all(isinstance(mark, str) for mark in marks):
        resolver.problem((KEY,), marks, "must be a list of paths, each a string")
        return
    paths = [dotted(path) for path, _ in leaves(document.data)]
    known = frozenset(paths)
    for mark in marks:
        if mark not in known:
            told = "must be the path of a value that this spec states"
            resolver.problem((KEY,), mark, told, nearest(mark, paths))
