"""What a dialect file may say, line by line, as records; `parsing` reads them.

A line of `[config]` pairs one of their config keys with paths of ours; a line of `tensors` pairs their tensor
names with ours. `composeformer.dialects` explains the whole language.
"""

from collections.abc import Mapping

import attrs

from composeformer.dialects.expressions import Expression, Template

LAYER_SLOTS = ("mixer", "ffn")
END_SLOTS = ("embedding", "head", "residual", "predictor")


class _Unset:
    """Nothing was said, which differs from null."""

    def __repr__(self) -> str:
        return "unset"


UNSET = _Unset()


@attrs.frozen(kw_only=True)
class Key:
    """One config key of theirs.

    `ours` are the paths it fills: `model.x`, `num_layers`, `mixer.x.y` and `ffn.x` of each layer, or an end
    of the model; below `predictor` only where there is one. `name` is what expressions call its value. `also`
    are other names of the key. A missing key has the `default` (text after `=` is an expression); a null is the
    default, an absent value, an expression's, or refused; `absent` is theirs for a value that there is none.
    `values` maps theirs to ours. `require` refuses every other value, `refuse` any, for the reason it is. A line
    holds only `when` its expression does. `choices` are the values of a key that fills no path and only names
    one, for other lines to hang on; the first whose `when` holds is written. `stored` is how tensors of theirs
    begin: where a model has none, the value is absent whatever the key says. A `shape` line reads a tensor's shape
    instead: one dimension, or whether it `exists` or is `missing`.
    """

    theirs: str
    ours: tuple[str, ...]
    name: str | None
    default: object = UNSET
    null: object = "refused"  # or "default", "absent", or an expression
    values: Mapping[str, object] | None = None
    require: object = UNSET
    when: Expression | None = None
    write: str = "always"
    shape: int | str | None = None
    also: tuple[str, ...] = ()
    absent: object = UNSET
    choices: tuple["Fixed", ...] = ()
    refuse: str | None = None
    stored: Template | None = None


@attrs.frozen(kw_only=True)
class Fixed:
    """A value of ours that the family fixes, at one path."""

    ours: str
    value: object
    when: Expression | None = None


@attrs.frozen(kw_only=True)
class Refusal:
    """What can not be together in the family, and why; `layer` is where `when` is asked, if it is of layers."""

    when: Expression
    why: str
    layer: Expression | None = None


@attrs.frozen(kw_only=True)
class Test:
    """One way to say which layers are chosen; `key` is theirs, `all` has none."""

    kind: str  # list, first, beyond, every, indices, all_but, all
    key: str
    default: object = UNSET
    chosen: str = ""
    other: str = ""
    offset: int = 0


@attrs.frozen(kw_only=True)
class Pattern:
    """Which layers differ. On our side a layer is chosen where the path `ours` has a value, or `equals` that.

    On theirs the first of `choose` whose keys are stated or have defaults decides, and tests in one of them
    must all choose; none is chosen where their boolean key `switch` is false.
    """

    name: str
    ours: str
    equals: object
    switch: str | None
    switch_default: bool
    choose: tuple[tuple[Test, ...], ...]

    @property
    def keys(self) -> frozenset[str]:
        tests = {test.key for alternative in self.choose for test in alternative if test.kind != "all"}
        return frozenset(tests | ({self.switch} if self.switch else set()))


@attrs.frozen(kw_only=True)
class TensorLine:
    """Tensors that hold the same numbers. Reading joins theirs, views, permutes, and splits into ours.

    `{l}` in a name means each layer, or `each` gives its number of values (none where it has none itself); the
    index of `stack` counts tensors that are one stacked tensor on the other side. Several names on a side
    are parts along the dimension `split`, equal ones unless `sizes` says more. `shape` is theirs where it
    is not ours. `drop` and `same_as` lines have no ours: the first are never read, the second must equal
    another tensor of theirs, and are written when `copy`.
    """

    theirs: tuple[Template, ...]
    ours: tuple[Template, ...] = ()
    when: Expression | None = None
    stack: tuple[str, Expression] | None = None
    each: Expression | None = None
    split: int = 0
    sizes: tuple[Expression, ...] | None = None
    view: tuple[Expression, ...] | None = None
    permute: tuple[int, ...] | None = None
    shape: tuple[Expression, ...] | None = None
    same_as: Template | None = None
    copy: bool = False
    drop: str | None = None

    @property
    def label(self) -> str:
        return self.theirs[0].text

    @property
    def names(self) -> frozenset[str]:
        """The names that the line depends on, indices included."""
        sizes = (*(self.view or ()), *(self.sizes or ()), *(self.shape or ()))
        texts = (*self.theirs, *self.ours, *((self.same_as,) if self.same_as else ()))
        found = [each.names for each in (self.when, self.each, *sizes) if each is not None]
        return frozenset[str]().union(*found, *(each.names for each in texts))
