"""A hypothesis strategy of small valid specs over every slot and plugin, as plain data for `Spec.from_dict`.

It varies all that the spec language can say: named components and single ones, references, refinements, inline tables,
nested patterns, absent parts, a predictor's own layer, tied ends, tables of a run. What there is to choose from comes
from the registry; a component's tables come from its own strategy or its fields (`tables`).

```python
@given(specs(mixers=st.just({"kind": "mine", "num_heads": 2})))
def test_builds(data): build(Spec.from_dict(data), device="meta")
```
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from composeformer.config import LAYER, FieldFacts, facts_of
from composeformer.contracts import RUN_SLOTS, SINGLE, SUBLAYERS, Component
from composeformer.errors import SpecError
from composeformer.plugins import current
from composeformer.precision import starred
from composeformer.registry import Registry
from composeformer.spec import Spec, inherit
from composeformer.spec.document import from_data
from composeformer.testing.tables import Table, tables

Tables = st.SearchStrategy[Table]

NAMES = st.sampled_from(["main", "local", "wide", "a b", "x.y", "é"])
TITLES = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=8)
# Multiples of four, as the strategies of components expect.
WIDTHS = st.integers(2, 6).map(lambda n: 4 * n)
STDS = st.sampled_from([0.02, 0.5, 1e-3])
# Tokens that every model has room for: laws make rows of as many.
LEAST = 16
MOST_LAYERS = 6
MOST_NESTED = 2
DEEPEST = 3  # parts within parts within parts
# What a model is made of beside its layers, each at most once.
ENDS = tuple(slot for slot in SINGLE if slot not in RUN_SLOTS)


@st.composite
def specs(
    draw: st.DrawFn,
    *,
    mixers: Tables | None = None,
    ffns: Tables | None = None,
    run: bool = True,
    registry: Registry | None = None,
    preferred: Sequence[Component] = (),
    stds: st.SearchStrategy[float] = STDS,
) -> Table:
    """Data of a valid spec of at most six layers, 8 to 24 features wide. With `run` it may have tables of a run too.

    `preferred` components are chosen where they can be, three times in four.
    """
    writer = _Writer(draw, current().registry if registry is None else registry, preferred)
    writer.given |= {slot: each for slot, each in (("mixer", mixers), ("ffn", ffns)) if each is not None}
    data = writer.data(stds)
    spec = _repaired(data, writer)
    if spec is None:
        reject()
    if run and draw(st.booleans()):
        data |= writer.run(spec)
        if _read(data, writer.registry) is None:
            for slot in (*RUN_SLOTS, "parallel"):
                data.pop(slot, None)
    return data


def _read(data: Mapping[str, Any], registry: Registry) -> Spec | None:
    """The spec of these data, or None where they are of none."""
    try:
        return Spec(inherit.resolve(from_data(data, "drawn"), None), registry)
    except SpecError:
        return None


def _repaired(data: Table, writer: "_Writer") -> Spec | None:
    """The spec of the data. What a refinement says may not fit what it refines: then it is left out."""
    found = _read(data, writer.registry)
    if found is None and writer.refinements:
        for each in writer.refinements:
            for key in [key for key in each if key != "use"]:
                del each[key]
        found = _read(data, writer.registry)
    return found


class _Writer:
    """Draws one spec. `named` gets the components of a slot when the first of them is referred to."""

    def __init__(self, draw: st.DrawFn, registry: Registry, preferred: Sequence[Component]) -> None:
        self.draw = draw
        self.registry = registry
        self.pool = tuple(registry)
        self.preferred = preferred
        self.given: dict[str, Tables] = {}
        self.named: dict[str, dict[str, Table]] = {}
        self.refinements: list[Table] = []

    def data(self, stds: st.SearchStrategy[float]) -> Table:
        """All but the tables of a run."""
        draw = self.draw
        sizes = {
            "vocab_size": draw(st.integers(1, 40)),
            "hidden_size": draw(WIDTHS),
            "max_position_embeddings": draw(st.sampled_from([64, LEAST, 4096]) | st.integers(LEAST, 4096)),
        }
        more = {"tie_embeddings": st.booleans(), "init_std": stds}
        data: Table = {"model": {**sizes, **draw(st.fixed_dictionaries({}, optional=more))}}
        layers = self.entries(0)
        if count(layers) > MOST_LAYERS:
            without_repeats(layers)
        for slot in ENDS:
            if not self.offered(slot):
                continue
            # What says nothing of its own is the default.
            default = self.registry.default(slot)
            if (default is None or slot == "predictor") and draw(st.booleans()):
                continue
            table = self.whole(slot)
            plain = default is not None and table == {"kind": default.kind}
            if not (plain and draw(st.booleans())):
                data[slot] = table
        for slot, named in self.named.items():
            data[slot] = named[slot] if list(named) == [slot] else named
        texts = {"name": TITLES, "format": st.just(1), "description": st.text(max_size=8)}
        return {**data, "layers": layers, **draw(st.fixed_dictionaries({}, optional=texts))}

    def run(self, spec: Spec) -> Table:
        """Tables of a run: some of them."""
        draw = self.draw
        found: Table = {}
        for slot in RUN_SLOTS:
            stated: bool = draw(st.booleans())
            if stated and self.offered(slot):
                found[slot] = self.whole(slot)
        if "precision" in found and draw(st.booleans()):
            linears = spec.plan.linears
            plain = [name for name in spec.plan.tensors if name.rpartition(".")[0] not in linears]
            roles = sorted({starred(name) for name in (*linears, *plain)})
            rule = {"roles": draw(st.sampled_from(["*", *roles])), "format": self.kind("precision").kind}
            found["precision"]["rules"] = [rule]
        rates = st.sampled_from([0.01, 0.0])
        train = {"steps": st.integers(1, 9), "learning_rate": rates, "clip_norm": st.sampled_from([1.0, 0.1])}
        parallel = {"shard": st.booleans(), "expert": st.sampled_from([1, 2])}
        for name, fields in (("train", train), ("parallel", parallel)):
            if draw(st.booleans()):
                found[name] = draw(st.fixed_dictionaries({}, optional=fields))
        return found

    # Components

    def offered(self, slot: str) -> list[Component]:
        return [each for each in self.pool if each.slot == slot]

    def kind(self, slot: str) -> Component:
        """A component of the slot."""
        offered = self.offered(slot)
        near = [each for each in self.preferred if each.slot == slot and each in offered]
        often: int = self.draw(st.integers(0, 3))
        chosen: Component = self.draw(st.sampled_from(near if near and often else offered))
        return chosen

    def whole(self, slot: str, depth: int = 0) -> Table:
        """A table of a component, with what its fields take."""
        if slot in self.given:
            table = dict(self.draw(self.given[slot]))
            component = self.registry.get(slot, table["kind"])
        else:
            component = self.kind(slot)
            table = dict(self.draw(tables(component)))
        for name, fact in facts_of(component.config).items():
            if fact.slot is None or fact.by_kind or name in table:
                continue
            if not self.left_out(fact, depth):
                found = self.layer() if fact.slot == LAYER else self.reference(fact.slot, depth + 1)
                table |= {} if found is None else {name: found}
        if self.draw(st.integers(0, 7)) == 0:
            table["implementation"] = "reference"
        return table

    def left_out(self, fact: FieldFacts, depth: int) -> bool:
        return fact.optional and (depth >= DEEPEST or not self._has(fact) or bool(self.draw(st.booleans())))

    def _has(self, fact: FieldFacts) -> bool:
        return fact.slot == LAYER or bool(self.offered(str(fact.slot)))

    def names(self, slot: str) -> list[str]:
        """The names of a slot's components: one like the slot or otherwise, or several."""
        if slot not in self.named:
            several = st.lists(NAMES, min_size=1, max_size=2, unique=True)
            names: list[str] = self.draw(st.just([slot]) | several)
            self.named[slot] = {name: {} for name in names}
            for name in names:
                self.named[slot][name] = self.whole(slot)
        return list(self.named[slot])

    def reference(self, slot: str, depth: int = 0) -> Any:
        """A name, a refinement, an inline table, or None where the only component is meant."""
        names = self.names(slot)
        name = self.draw(st.sampled_from(names))
        table = self.named[slot][name]
        # A component that is being drawn can not take itself.
        ways = ["inline"] if not table else ["name", "use", "refined", "inline"]
        if not table or depth >= DEEPEST:
            ways = [way for way in ways if way != "refined"]
        if table and len(names) == 1:
            ways.append("default")
        way = self.draw(st.sampled_from(ways))
        if way == "inline":
            return self.whole(slot, depth)
        if way == "refined":
            return self.refined(slot, name, table)
        return {"name": name, "use": {"use": name}, "default": None}[way]

    def refined(self, slot: str, name: str, table: Table) -> Table:
        """A reference with some values of its own."""
        component = self.registry.get(slot, table["kind"])
        drawn = self.draw(self.given.get(slot, tables(component)))
        facts = facts_of(component.config)
        fields = [key for key in drawn if key in facts and facts[key].slot is None]
        if drawn["kind"] != table["kind"] or not fields:
            return {"use": name}
        kept = self.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2, unique=True))
        found: Table = {"use": name} | {key: drawn[key] for key in kept}
        self.refinements.append(found)
        return found

    # Layers

    def entries(self, depth: int) -> list[Table]:
        found: list[Table] = []
        for _ in range(self.draw(st.integers(1, 2))):
            entry = self.draw(st.fixed_dictionaries({}, optional={"repeat": st.integers(1, 2)}))
            nested = depth < MOST_NESTED and not self.draw(st.integers(0, 3))
            found.append({**entry, **({"layers": self.entries(depth + 1)} if nested else self.layer())})
        return found

    def layer(self) -> Table:
        """What a layer has, one of which may be none or be left out."""
        without = self.draw(st.sampled_from([None, None, None, *SUBLAYERS]))
        found: Table = {}
        for slot in SUBLAYERS:
            part = False if slot == without else self.reference(slot)
            found |= {} if part is None else {slot: part}
        return found


def count(entries: Sequence[Table]) -> int:
    """How many layers these are."""
    return sum(
        entry.get("repeat", 1) * (count(entry["layers"]) if "layers" in entry else 1) for entry in entries
    )


def without_repeats(entries: Sequence[Table]) -> None:
    """Each layer once."""
    for entry in entries:
        entry.pop("repeat", None)
        without_repeats(entry.get("layers", ()))
