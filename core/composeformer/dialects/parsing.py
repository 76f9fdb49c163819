"""Lines of a dialect file read from TOML tables. Strict: an unknown key is an error that names its place."""

from collections.abc import Mapping
from typing import Any

from composeformer.dialects.expressions import Expression, Template
from composeformer.dialects.lines import (
    END_SLOTS,
    LAYER_SLOTS,
    UNSET,
    Fixed,
    Key,
    Pattern,
    Refusal,
    TensorLine,
    Test,
)
from composeformer.errors import DialectError, nearest, one_of, show

TESTS = ("list", "first", "beyond", "every", "indices", "all_but", "all")
# Keys of a TOML table are texts.
_WORDS = {"true": True, "false": False}


OUR_HEADS = ("model", *LAYER_SLOTS, *END_SLOTS)


def key(
    theirs: str, table: object, where: str, shape: bool = False, heads: tuple[str, ...] = OUR_HEADS
) -> Key:
    t = Table(table, where)
    ours = t.texts("ours")
    name = t.text("name") or (ours[0].rpartition(".")[2] if ours else None)
    default, require = _literal(t.take("default")), _literal(t.take("require"))
    null = _literal(t.text("null") or "refused")
    write = t.text("write") or "always"
    values, absent, refuse = t.take("values"), t.take("absent"), t.text("refuse")
    also, stored = t.texts("also"), t.template("stored")
    choices = _choices(t.take("choices"), where)
    read: Any = None
    if shape:
        read = t.take("shape")
        if not (type(read) is int or read in ("exists", "missing")):
            t.fail(f'shape = {show(read)}: must be a dimension, "exists" or "missing"')
    if not isinstance(null, Expression) and null not in ("refused", "default", "absent"):
        t.fail(f'null = {show(null)}: must be "default", "absent" or "= EXPRESSION"')
    if write not in ("always", "changed", "never"):
        t.fail(f'write = {show(write)}: must be "always", "changed" or "never"')
    if not (ours or choices or refuse) and require is UNSET:
        t.fail("needs `ours`, `require`, `choices` or `refuse`")
    if choices and (ours or name is None):
        t.fail("`choices` go with a `name`, and fill no path")
    if stored is not None and absent is UNSET:
        t.fail("`stored` needs `absent`")
    if values is not UNSET and not isinstance(values, Mapping):
        t.fail("values must be a table from theirs to ours")
    when = t.expression("when")
    t.done()
    for path in ours:
        _check_path(path, t, heads)
    return Key(
        theirs=theirs,
        ours=ours,
        name=name,
        default=default,
        null=null,
        values=None if values is UNSET else {_WORDS.get(word, word): each for word, each in values.items()},
        require=require,
        when=when,
        write=write,
        shape=read,
        also=also,
        absent=absent,
        choices=tuple(choices),
        refuse=refuse,
        stored=stored,
    )


def fixed(path: str, found: object, where: str) -> list[Fixed]:
    """`path = value`, or a list of `{ value, when }`."""
    _check_path(path, Table({}, where))
    if isinstance(found, list):
        return _values(path, found, where)
    return [Fixed(ours=path, value=found)]


def _choices(found: object, where: str) -> list[Fixed]:
    if found is UNSET:
        return []
    if not isinstance(found, list):
        raise DialectError(f"{where}: choices must be a list of {{ value, when }}")
    return _values("", found, f"{where}.choices")


def _values(path: str, found: list[Any], where: str) -> list[Fixed]:
    made = []
    for index, each in enumerate(found):
        t = Table(each, f"{where}.{index}")
        made.append(Fixed(ours=path, value=t.take("value", required=True), when=t.expression("when")))
        t.done()
    return made


def refusal(table: object, where: str) -> Refusal:
    t = Table(table, where)
    when, layer = t.expression("when"), t.expression("layer")
    why = t.text("why", required=True)
    t.done()
    if when is None:
        return t.fail("needs `when`")  # type: ignore[no-any-return]
    return Refusal(when=when, why=str(why), layer=layer)


def pattern(name: str, table: object, where: str) -> Pattern:
    t = Table(table, where)
    ours = t.text("ours", required=True)
    choose = t.take("choose", required=True)
    if not isinstance(choose, list) or not choose:
        t.fail("choose must be a list of tests")
    alternatives = tuple(
        tuple(_test(test, f"{where}.choose") for test in (each if isinstance(each, list) else [each]))
        for each in choose
    )
    equals, switch, switch_default = t.take("equals"), t.text("switch"), t.take("switch_default")
    t.done()
    _check_path(str(ours), t)
    return Pattern(
        name=name,
        ours=str(ours),
        equals=equals,
        switch=switch,
        switch_default=switch_default is True,
        choose=alternatives,
    )


def _test(table: object, where: str) -> Test:
    t = Table(table, where)
    kinds = [kind for kind in TESTS if kind in t.rest]
    if len(kinds) != 1:
        t.fail(f"a test has one of {', '.join(TESTS)}")
    if kinds == ["all"]:
        if t.take("all") is not True:
            t.fail("all must be true")
        t.done()
        return Test(kind="all", key="", default=True)
    offset = t.take("offset")
    test = Test(
        kind=kinds[0],
        key=str(t.text(kinds[0])),
        default=t.take("default"),
        chosen=t.text("chosen") or "",
        other=t.text("other") or "",
        offset=0 if offset is UNSET else offset,
    )
    t.done()
    if test.kind == "list" and not (test.chosen and test.other):
        t.fail("a list test needs `chosen` and `other`")
    return test


def tensor(table: object, where: str) -> TensorLine:
    t = Table(table, where)
    theirs = tuple(Template(text) for text in t.texts("theirs"))
    ours = tuple(Template(text) for text in t.texts("ours"))
    stack, split, permute, drop = t.take("stack"), t.take("split"), t.take("permute"), t.text("drop")
    same_as, copy = t.text("same_as"), t.take("copy")
    if len(theirs) == 0:
        t.fail("needs `theirs`")
    if bool(ours) + (same_as is not None) + (drop is not None) != 1:
        t.fail("needs one of `ours`, `same_as` and `drop`")
    index: tuple[str, Expression] | None = None
    if stack is not UNSET:
        if not isinstance(stack, dict) or len(stack) != 1:
            t.fail("stack must be a table with one index: { e = SIZE }")
        index = next((str(name), Expression(str(size))) for name, size in stack.items())
    if permute is not UNSET and (
        not isinstance(permute, list) or sorted(permute) != list(range(len(permute)))
    ):
        t.fail("permute must be an order of dimensions")
    line = TensorLine(
        theirs=theirs,
        ours=ours,
        when=t.expression("when"),
        stack=index,
        each=t.expression("each"),
        split=0 if split is UNSET else split,
        sizes=t.expressions("sizes"),
        view=t.expressions("view"),
        permute=None if permute is UNSET else tuple(permute),
        shape=t.expressions("shape"),
        same_as=None if same_as is None else Template(same_as),
        copy=copy is True,
        drop=drop,
    )
    t.done()
    return line


class Table:
    """A table being read: what was not taken in the end is unknown."""

    def __init__(self, found: object, where: str) -> None:
        if not isinstance(found, Mapping):
            raise DialectError(f"{where} must be a table")
        self.where = where
        self.rest = dict(found)
        self.known: list[str] = []

    def fail(self, reason: str) -> Any:
        raise DialectError(f"{self.where}: {reason}")

    def take(self, name: str, required: bool = False) -> Any:
        self.known.append(name)
        if required and name not in self.rest:
            self.fail(f"needs `{name}`")
        return self.rest.pop(name, UNSET)

    def text(self, name: str, required: bool = False) -> str | None:
        found = self.take(name, required)
        if found is UNSET:
            return None
        if not isinstance(found, str) or not found:
            self.fail(f"{name} = {show(found)}: must be text")
        return str(found)

    def texts(self, name: str) -> tuple[str, ...]:
        found = self.take(name)
        listed = [] if found is UNSET else found if isinstance(found, list) else [found]
        if not all(isinstance(each, str) and each for each in listed):
            self.fail(f"{name} must be text, or a list of texts")
        return tuple(listed)

    def expression(self, name: str) -> Expression | None:
        text = self.text(name)
        return None if text is None else self._expression(text)

    def template(self, name: str) -> Template | None:
        text = self.text(name)
        return None if text is None else Template(text)

    def expressions(self, name: str) -> tuple[Expression, ...] | None:
        found = self.take(name)
        if found is UNSET:
            return None
        if not isinstance(found, list):
            self.fail(f"{name} must be a list of sizes")
        return tuple(self._expression(str(each)) for each in found)

    def _expression(self, text: str) -> Expression:
        try:
            return Expression(text)
        except DialectError as error:
            return self.fail(error.lines[0])  # type: ignore[no-any-return]

    def done(self) -> None:
        for name in self.rest:
            near = nearest(name, self.known)
            self.fail(
                f"unknown key {name!r}; allowed: {one_of(self.known)}"
                + (f"; did you mean {near!r}?" if near else "")
            )


def _literal(found: Any) -> object:
    return Expression(found[1:].strip()) if isinstance(found, str) and found.startswith("=") else found


def _check_path(path: str, table: Table, heads: tuple[str, ...] = OUR_HEADS) -> None:
    head, _, rest = path.partition(".")
    whole = heads == OUR_HEADS and path == "num_layers"
    if not whole and not (rest and head in heads):
        starts = one_of(f"{slot}." for slot in heads)
        also = "it is num_layers, or begins" if heads == OUR_HEADS else "it begins"
        table.fail(f"{show(path)} is no path of ours; {also} with one of {starts}")
