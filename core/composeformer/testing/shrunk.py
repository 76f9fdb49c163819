"""A hypothesis strategy of shipped specs in miniature: what dialects can say, which a spec drawn at large seldom is.

Every part and choice of a shipped spec stays; sizes and other numbers that it states are drawn anew, as the components'
own strategies draw them.
"""

from collections.abc import Mapping
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from composeformer.config import facts_of
from composeformer.contracts import RUN_SLOTS, SLOTS
from composeformer.errors import ComposeError
from composeformer.registry import Registry
from composeformer.spec import Spec, shipped
from composeformer.testing.specs import WIDTHS, count, without_repeats
from composeformer.testing.tables import Table, tables

SMALLEST_SIZE = 8  # integers above it that a strategy leaves to their default are left out
MOST_LAYERS = 3


@st.composite
def shrunk(draw: st.DrawFn, registry: Registry) -> Table:
    """Data of a shipped spec of few small layers, without the tables of a run."""
    try:
        data = Spec.load(draw(st.sampled_from(shipped()))).to_dict()
    except ComposeError:
        reject()  # one that needs a plugin which is not there
    for slot in (*RUN_SLOTS, "train", "parallel", "cost", "source", "unverified"):
        data.pop(slot, None)
    sizes = {
        "vocab_size": draw(st.integers(2, 40)),
        "hidden_size": draw(WIDTHS),
        "max_position_embeddings": 2 ** draw(st.integers(5, 9)),
        "init_std": draw(st.sampled_from([0.5, 0.25])),
    }
    data["model"] = {**data["model"], **sizes}
    kinds = {slot: registry.kinds(slot) for slot in SLOTS}
    whole: Table = {key: _smaller(draw, each, key, kinds, registry) for key, each in data.items()}
    for entry in whole["layers"]:
        entry["repeat"] = min(2, entry.get("repeat", 1))
    if count(whole["layers"]) > MOST_LAYERS:
        without_repeats(whole["layers"])
    return whole


def _smaller(
    draw: st.DrawFn, found: Any, slot: str, kinds: Mapping[str, tuple[str, ...]], registry: Registry
) -> Any:
    """The same with every component's numbers drawn; `slot` is the nearest key that is one."""
    if isinstance(found, list):
        return [_smaller(draw, each, slot, kinds, registry) for each in found]
    if not isinstance(found, dict):
        return found
    kind = found.get("kind")
    own: dict[str, Any] = {}
    if kind in kinds.get(slot, ()):
        component = registry.get(slot, kind)
        facts = facts_of(component.config)
        drawn = draw(tables(component))
        for key, value in found.items():
            number = key in facts and facts[key].kind in ("integer", "float") and not facts[key].many
            if number and key in drawn:
                own[key] = drawn[key]
            elif not (
                number and facts[key].kind == "integer" and value > SMALLEST_SIZE and not facts[key].required
            ):
                own[key] = value
        if "num_groups" not in own:
            own.pop("top_k_groups", None)
    else:
        own = dict(found)
    return {
        key: _smaller(draw, value, key if key in kinds else slot, kinds, registry)
        for key, value in own.items()
    }
