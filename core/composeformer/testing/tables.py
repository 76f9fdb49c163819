"""Tiny tables of a component, drawn: by its own strategy, or from what its fields say.

A strategy, named in `Component.strategy`, draws tables of one kind without the parts they take; whoever needs a whole
table gives it parts with `completed`. Without a strategy every field is drawn within its limits, small.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from math import isfinite
from typing import Any

from hypothesis import strategies as st

from composeformer import lazy
from composeformer.config import LAYER, FieldFacts, facts_of
from composeformer.contracts import Component
from composeformer.errors import InputError, show

Table = dict[str, Any]

LARGEST = 6  # multiples of a size that is drawn from a field
TINY = 2.0**-30  # what is drawn from a field is no smaller: float32 keeps it, and its square
DEEPEST = 3  # parts within parts within parts


@cache
def tables(component: Component) -> "st.SearchStrategy[Table]":
    """Tables of a component without its parts. Raises InputError where a field can not be drawn without a strategy, and
    where the strategy is none, or draws what is no table of that kind.
    """
    if component.strategy is not None:
        return _stated(component, component.strategy)
    fixed: dict[str, st.SearchStrategy[Any]] = {"kind": st.just(component.kind)}
    more: dict[str, st.SearchStrategy[Any]] = {}
    for name, fact in facts_of(component.config).items():
        if fact.slot is None and fact.record is None:
            (fixed if fact.required else more)[name] = _values(component, fact)
    return st.fixed_dictionaries(fixed, optional=more)


@st.composite
def completed(
    draw: st.DrawFn, table: Table, component: Component, pool: Sequence[Component], depth: int = 0
) -> Table:
    """The table with a drawn part, whole, in every field that takes one and has none. `pool` is what there is to choose
    from; where one component is the nearest to try (a plugin's own), it stands first.
    """
    whole = dict(table)
    for name, fact in facts_of(component.config).items():
        if fact.slot is None or fact.slot == LAYER or fact.by_kind or name in whole:
            continue
        offered = [each for each in pool if each.slot == fact.slot]
        if fact.optional and (depth >= DEEPEST or not offered or draw(st.booleans())):
            continue
        if not offered:
            raise InputError(
                f"{component.slot} {component.kind}: {name} takes a {fact.slot}, and there is none"
            )
        whole[name] = draw(whole_tables(draw(st.sampled_from(offered)), pool, depth + 1))
    return whole


@st.composite
def whole_tables(draw: st.DrawFn, component: Component, pool: Sequence[Component], depth: int = 0) -> Table:
    """Tables of a component with all its parts in them."""
    return draw(completed(draw(tables(component)), component, pool, depth))


def _stated(component: Component, name: str) -> "st.SearchStrategy[Table]":
    """The component's own strategy, which answers for what it draws."""
    who = f"{component.slot} {component.kind}: strategy {name!r}"
    try:
        found = lazy.load(name)
        made = found() if callable(found) else found
    except (Exception, SystemExit) as error:
        raise InputError(f"{who}: raised {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(made, st.SearchStrategy):
        raise InputError(f"{who}: is {type(made).__name__}; must be a strategy of hypothesis, or a function of one")

    def checked(table: Any) -> Table:
        if not isinstance(table, Mapping):
            raise InputError(f"{who}: draws {show(table)}; must draw tables, with 'kind' = {component.kind!r}")
        if table.get("kind") != component.kind:
            raise InputError(f"{who}: draws kind = {show(table.get('kind'))}; must be {component.kind!r}")
        return dict(table)

    return made.map(checked)


def _values(component: Component, fact: FieldFacts) -> "st.SearchStrategy[Any]":
    one = _one(component, fact)
    return st.lists(one, min_size=1, max_size=3) if fact.many else one


def _one(component: Component, fact: FieldFacts) -> "st.SearchStrategy[Any]":
    if fact.choices is not None:
        return st.sampled_from(list(fact.choices))
    if fact.kind == "boolean":
        return st.booleans()
    if fact.kind == "integer":
        step = fact.multiple_of or 1
        low = 1 if fact.minimum is None else int(fact.minimum)
        low = max(low, int(fact.above) + 1) if fact.above is not None else low
        first = -(-low // step)
        last = first + LARGEST if fact.maximum is None else min(first + LARGEST, int(fact.maximum) // step)
        return st.integers(first, last).map(lambda n: n * step)
    if fact.kind == "float":
        low_ = fact.minimum if fact.minimum is not None else fact.above if fact.above is not None else 0.0
        high = fact.maximum if fact.maximum is not None else low_ + 4.0
        drawn = st.floats(
            low_, high, allow_nan=False, allow_subnormal=False, exclude_min=fact.above is not None
        ).filter(lambda x: not 0 < abs(x) < TINY)
        stated = fact.default
        if not fact.required and isinstance(stated, float) and isfinite(stated):
            return st.just(stated) | drawn
        return drawn
    if not fact.required and isinstance(fact.default, str):
        return st.just(fact.default)
    raise InputError(
        f"{component.slot} {component.kind}: {fact.name} takes any string; say by `strategy` what to try there"
    )
