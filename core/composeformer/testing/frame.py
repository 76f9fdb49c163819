"""The smallest whole spec around a part under test, drawn: one layer, and whatever takes a part of that slot.

The parts around it are of its own plugin or built in; none is known by name.
"""

from typing import Any

from hypothesis import strategies as st

from composeformer.config import facts_of
from composeformer.contracts import RUN_SLOTS, SINGLE, SUBLAYERS, Component
from composeformer.errors import InputError
from composeformer.implementations import PHASED
from composeformer.testing.subject import Subject
from composeformer.testing.tables import Table, completed, tables, whole_tables

VOCABULARY, LONGEST = 24, 256
# Large, lest attention be uniform, gates half open, and errors hide.
STDS = (0.5, 0.25)


@st.composite
def frames(draw: st.DrawFn, subject: Subject) -> Table:
    """Data of a spec with the component in it, in the implementation under test. Most are valid."""
    data: Table = {
        "model": {
            "vocab_size": draw(st.integers(2, VOCABULARY)),
            "hidden_size": 4 * draw(st.integers(2, 6)),
            "max_position_embeddings": LONGEST,
            "init_std": draw(st.sampled_from(STDS)),
            "tie_embeddings": draw(st.booleans()),
        }
    }
    component, pool = subject.component, subject.pool
    table = {**draw(tables(component)), **implemented(subject)}
    if component.slot in RUN_SLOTS and component.slot != "codec":
        data[component.slot] = draw(completed(table, component, pool))
        component, table = _other(draw, subject, "ffn")
    while component.slot not in (*SUBLAYERS, *SINGLE):
        host, field = draw(st.sampled_from(_hosts(subject, component)))
        around = {**draw(tables(host)), field: draw(completed(table, component, pool))}
        component, table = host, around
    whole = draw(completed(table, component, pool))
    slot = component.slot
    if slot in SUBLAYERS:
        data["layers"] = [{each: whole if each == slot else False for each in SUBLAYERS}]
    else:
        data[slot] = whole
        beside = {
            each: draw(whole_tables(draw(st.sampled_from(_some(subject, each))), pool)) for each in SUBLAYERS
        }
        data["layers"] = [beside]
    if slot != "residual":
        data["residual"] = draw(whole_tables(_default(subject, "residual"), pool))
    return data


def implemented(subject: Subject) -> Table:
    """The choice of the implementation under test in the phases that it serves."""
    name, phases = subject.implementation.name, subject.implementation.phases
    if subject.slot not in PHASED:
        return {"implementation": name}
    return {"implementation": dict.fromkeys(phases, name)}


def _hosts(subject: Subject, component: Component) -> list[tuple[Component, str]]:
    """What takes a part of the component's slot, and in which field."""
    found = [
        (host, name)
        for host in subject.pool
        for name, fact in facts_of(host.config).items()
        if fact.slot == component.slot and not fact.by_kind and host.slot != component.slot
    ]
    if not found:
        raise InputError(
            f"{component.slot} {component.kind}: nothing that is installed takes a {component.slot}"
        )
    return found


def _some(subject: Subject, slot: str) -> tuple[Component, ...]:
    found = subject.of_slot(slot)
    if not found:
        raise InputError(f"{subject}: nothing that is installed is a {slot}")
    return found


def _default(subject: Subject, slot: str) -> Component:
    found = _some(subject, slot)
    return next((each for each in found if each.default), found[0])


def _other(draw: Any, subject: Subject, slot: str) -> tuple[Component, Table]:
    component = draw(st.sampled_from(_some(subject, slot)))
    return component, draw(tables(component))
