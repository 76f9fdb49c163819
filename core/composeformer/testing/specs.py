"""Hypothesis strategies of small valid specs, as plain data for `Spec.from_dict`.

They vary all that the spec language can say: named components and single ones, references, refinements,
inline tables, patterns, absent parts, a predictor's own layer. Pass tables of a new kind to see it in all these places:

```python
@given(specs(mixers=st.just({"kind": "mine", "num_heads": 2})))
def test_builds(data): build(Spec.from_dict(data), device="meta")
```
"""

from typing import Any

from hypothesis import strategies as st

from composeformer.testing.specs_moe import latents, mixtures, predictors, refined_mixtures, routers

Data = dict[str, Any]
Tables = st.SearchStrategy[Data]

TITLES = st.text(max_size=8).filter(lambda text: bool(text.strip()) and text.isprintable())
NAMES = st.sampled_from(["main", "local", "wide", "a b", "x.y", "é"])
HIDDEN = 16


def some(fields: dict[str, st.SearchStrategy[Any]]) -> Tables:
    """Any subset of fields, each with a drawn value."""
    return st.fixed_dictionaries({}, optional=fields)


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


def norms() -> Tables:
    rms = st.builds(lambda more: {"kind": "rmsnorm", **more}, some({"eps": floats(1e-8, 0.1)}))
    layer = some({"eps": floats(1e-8, 0.1), "bias": st.booleans()})
    return rms | st.builds(lambda more: {"kind": "layernorm", **more}, layer)


def positions() -> Tables:
    """Positions for heads whose width is a multiple of four."""
    common = {
        "theta": floats(2.0, 1e6),
        "layout": st.sampled_from(["half-split", "interleaved"]),
        "fraction": st.sampled_from([0.5, 1.0, 1]),
    }
    scaled = {"factor": floats(1.0, 64.0)}
    original = {"original_max_position_embeddings": st.integers(64, 4096)}
    required: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "rope": {},
        "linear": scaled,
        "llama3": scaled | original,
        "yarn": scaled | original,
        "none": {},
    }

    def table(kind: str) -> Tables:
        fixed = st.fixed_dictionaries({"kind": st.just(kind), **required[kind]})
        return st.builds(lambda a, b: {**a, **b}, fixed, some(common if kind != "none" else {}))

    return st.sampled_from(list(required)).flatmap(table)


@st.composite
def attentions(draw: st.DrawFn) -> Data:
    """`gqa` without its parts, for any hidden size that is a multiple of 16."""
    heads = draw(st.sampled_from([1, 2, 4]))
    table: Data = {"kind": "gqa", "num_heads": heads}
    kv_heads = draw(st.sampled_from([None, *(n for n in (1, 2, 4) if heads % n == 0)]))
    head_dim = draw(st.sampled_from([None, 4, 8]))
    table |= {} if kv_heads is None else {"num_kv_heads": kv_heads}
    table |= {} if head_dim is None else {"head_dim": head_dim}
    switches = {name: st.booleans() for name in ("qkv_bias", "o_bias", "sinks")}
    return table | draw(some({**switches, "window": st.integers(1, 64), "cap": floats(1.0, 100.0)}))


def feed_forwards() -> Tables:
    activations = st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu2"])
    more = some({"activation": activations, "gated": st.booleans(), "bias": st.booleans()})
    return st.builds(
        lambda size, rest: {"kind": "swiglu", "intermediate_size": size, **rest}, st.integers(1, 40), more
    )


@st.composite
def specs(
    draw: st.DrawFn,
    *,
    mixers: Tables | None = None,
    ffns: Tables | None = None,
    run: bool = True,
) -> Data:
    """Data of a valid spec: at most 24 layers, hidden sizes 16 to 48. With `run` it may have run tables too."""
    hidden = HIDDEN * draw(st.integers(1, 3))
    vocab, longest = draw(st.integers(1, 64)), draw(st.integers(8, 4096))
    model: Data = {"vocab_size": vocab, "hidden_size": hidden, "max_position_embeddings": longest}
    model |= draw(some({"tie_embeddings": st.booleans(), "init_std": floats(1e-3, 1.0)}))
    data: Data = {"model": model}
    tables = {
        "norm": _named(draw, "norm", norms()),
        "position": _named(draw, "position", positions()),
        "ffn": _named(draw, "ffn", feed_forwards() | mixtures() if ffns is None else ffns),
        "mixer": _named(draw, "mixer", attentions() | latents() if mixers is None else mixers),
    }
    if any(table["kind"] == "moe" for table in tables["ffn"].values()):
        tables["router"] = _named(draw, "router", routers())
    for table in (*tables["mixer"].values(), *tables["ffn"].values()):
        _give_parts(draw, table, tables)
    norm = _reference(draw, tables["norm"], norms())
    if norm is not None:
        data["residual"] = {"kind": "pre-norm", "norm": norm}
    for slot, named in tables.items():
        name = next(iter(named))
        single = len(named) == 1 and name == slot
        data[slot] = named[name] if single else named
    data["layers"] = _entries(draw, tables, 0)
    if draw(st.booleans()):
        data["predictor"] = _predictor(draw, tables)
    data |= draw(some({"name": TITLES, "format": st.just(1), "description": st.text(max_size=8)}))
    ends = {
        "embedding": some({"scale": floats(0.1, 10.0)}),
        "head": some({"scale": floats(0.1, 10.0), "cap": floats(1.0, 50.0)}),
    }
    kinds = {"embedding": "token", "head": "linear"}
    for slot, fields in ends.items():
        if draw(st.booleans()):
            data[slot] = {"kind": kinds[slot], **draw(fields)}
    if run and draw(st.booleans()):
        data["precision"] = draw(st.sampled_from([{"kind": "bf16"}, {"kind": "full", "dtype": "bfloat16"}]))
        data["train"] = draw(some({"steps": st.integers(1, 9), "learning_rate": floats(0, 1)}))
    return data


def _named(draw: st.DrawFn, slot: str, tables: Tables) -> dict[str, Data]:
    """One component named like its slot or otherwise, or several."""
    names = draw(st.just([slot]) | st.lists(NAMES, min_size=1, max_size=2, unique=True))
    return {name: dict(draw(tables)) for name in names}


def _reference(draw: st.DrawFn, named: dict[str, Data], tables: Tables) -> Any:
    """A name, a refinement, an inline table, or nothing where the only component is meant."""
    name = draw(st.sampled_from(list(named)))
    ways: list[Any] = [name, {"use": name}, draw(tables)]
    ways += [None] if len(named) == 1 else []
    return draw(st.sampled_from(ways))


# The fields of built-in kinds that take parts: the slot of each, and whether it may be left out.
PARTS: dict[str, dict[str, tuple[str, bool]]] = {
    "gqa": {"position": ("position", False), "qk_norm": ("norm", True)},
    "mla": {"position": ("position", False), "norm": ("norm", False)},
    "moe": {"router": ("router", False)},
    "mtp": {"norm": ("norm", False)},
}


def _give_parts(draw: st.DrawFn, table: Data, tables: dict[str, dict[str, Data]]) -> None:
    inline = {"position": positions, "norm": norms, "router": routers}
    for field, (slot, optional) in PARTS.get(table["kind"], {}).items():
        if optional and draw(st.booleans()):
            continue
        found = _reference(draw, tables[slot], inline[slot]())
        table |= {} if found is None else {field: found}


def _predictor(draw: st.DrawFn, tables: dict[str, dict[str, Data]]) -> Data:
    table = dict(draw(predictors()))
    _give_parts(draw, table, tables)
    if draw(st.booleans()):
        table["layer"] = _layer(draw, tables)
    return table


def _entries(draw: st.DrawFn, tables: dict[str, dict[str, Data]], depth: int) -> list[Data]:
    entries: list[Data] = []
    for _ in range(draw(st.integers(1, 2))):
        entry: Data = draw(some({"repeat": st.integers(1, 2)}))
        if depth < 2 and draw(st.booleans()):
            entries.append({**entry, "layers": _entries(draw, tables, depth + 1)})
        else:
            entries.append({**entry, **_layer(draw, tables)})
    return entries


def _layer(draw: st.DrawFn, tables: dict[str, dict[str, Data]]) -> Data:
    """A layer's mixer and ffn, one of which may be none or be left out."""
    layer: Data = {}
    without = draw(st.sampled_from([None, None, "mixer", "ffn"]))
    for slot in ("mixer", "ffn"):
        named = tables[slot]
        name = draw(st.sampled_from(list(named)))
        ways: list[Any] = [name, {"use": name}, *([None] if len(named) == 1 else [])]
        if named[name]["kind"] in ("gqa", "mla"):
            ways.append({"use": name, "window": draw(st.integers(1, 64))})
        if named[name]["kind"] == "moe":
            ways.append(draw(refined_mixtures(name)))
        found = False if slot == without else draw(st.sampled_from(ways))
        layer |= {} if found is None else {slot: found}
    return layer
