"""Laws: what every part of a slot must satisfy, and what a part may claim beyond that.

A law is a function of a `Case`: it draws what it needs, computes, and compares by the case's own methods, which
raise `LawBroken`. It is written from the mathematics of the slot and knows no kind. `kills` names a wrong
variant of a part that this law alone tells from a right one; nothing here imports those.

```python
@law("mixer", "causal", "a later token changes no earlier output", kills="mask-off-by-one")
def causal(case: Case) -> None: ...
```
"""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import attrs

from composeformer.contracts import Component
from composeformer.errors import InputError, nearest, one_of

if TYPE_CHECKING:
    from composeformer.testing.case import Case
    from composeformer.testing.subject import Subject

# The slot of laws that hold for every part, and that of laws of whole models.
EVERYWHERE, MODEL = "everywhere", "model"


class LawBroken(AssertionError):
    """What a law found that must not be, in one line."""


@attrs.frozen(eq=False, kw_only=True)
class Law:
    """`told` is the property in words. A `claimed` law holds for parts that claim it, all others for every part.

    `applies(subject)` gives the reason why a part is beyond the law, None where it is not. `examples` is the number
    of cases of an ordinary run. `shrinks` is False for a law about what it can not find, which smaller cases lack too.
    """

    slot: str
    name: str
    told: str
    run: "Callable[[Case], None]"
    kills: str
    claimed: bool = False
    applies: "Callable[[Subject], str | None] | None" = None
    examples: int = 15
    shrinks: bool = True

    @property
    def id(self) -> str:
        return f"{self.slot}.{self.name}"

    def __str__(self) -> str:
        return self.id

    def of(self, component: Component) -> bool:
        """Whether a component has to obey it."""
        return self.slot in (component.slot, EVERYWHERE) and (
            not self.claimed or self.name in component.claims
        )


_LAWS: dict[str, Law] = {}


def law(
    slot: str,
    name: str,
    told: str,
    *,
    kills: str,
    claimed: bool = False,
    applies: "Callable[[Subject], str | None] | None" = None,
    examples: int = 15,
    shrinks: bool = True,
) -> "Callable[[Callable[[Case], None]], Law]":
    """Makes a law of a function, and registers it. Raises ValueError where a slot has the name already."""

    def make(run: "Callable[[Case], None]") -> Law:
        made = Law(
            slot=slot,
            name=name,
            told=told,
            run=run,
            kills=kills,
            claimed=claimed,
            applies=applies,
            examples=examples,
            shrinks=shrinks,
        )
        if made.id in _LAWS:
            raise ValueError(f"there are two laws {made.id}")
        _LAWS[made.id] = made
        return made

    return make


def all_laws() -> tuple[Law, ...]:
    """Every law there is, by slot and in the order of its module."""
    from composeformer.testing import laws

    for found in iter_modules(laws.__path__):
        import_module(f"{laws.__name__}.{found.name}")
    return tuple(_LAWS.values())


def laws_for(component: Component) -> tuple[Law, ...]:
    """The laws that a component has to obey: those of its slot, those of every slot, those that it claims.

    Raises InputError for a claim that is no law.
    """
    every = all_laws()
    known = {each.name: each for each in every if each.slot in (component.slot, EVERYWHERE)}
    for claim in component.claims:
        if claim not in known or not known[claim].claimed:
            allowed = [each.name for each in known.values() if each.claimed]
            near = nearest(claim, allowed)
            hint = f"; did you mean {near!r}?" if near else ""
            raise InputError(
                f"{component.slot} {component.kind}: claims {claim!r}, which is no law that a {component.slot} "
                f"can claim; allowed: {one_of(allowed)}{hint}"
            )
    return tuple(each for each in every if each.of(component))


def model_laws() -> tuple[Law, ...]:
    """The laws of whole models."""
    return tuple(each for each in all_laws() if each.slot == MODEL)


def find_law(name: str) -> Law:
    """The law `slot.name`. Raises InputError for one that there is not."""
    every = {each.id: each for each in all_laws()}
    if name not in every:
        near = nearest(name, every)
        hint = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"{name}: no such law{hint}")
    return every[name]
