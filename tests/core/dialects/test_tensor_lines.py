"""Tensor lines on layouts of many families: they read and write bit by bit, and account for every key."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from composeformer.contracts import Weight
from composeformer.dialects import rules, transfer
from composeformer.dialects.family import Family
from composeformer.dialects.parsing import tensor
from composeformer.dialects.reading import Values
from composeformer.errors import DialectError

Lines = list[dict[str, Any]]


class Store:
    """Tensors by name, as a folder's reader gives them; counts what is loaded."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.loaded: list[str] = []

    def names(self) -> Mapping[str, Tensor]:
        return self.tensors

    def get(self, name: str, /) -> Tensor:
        self.loaded.append(name)
        return self.tensors[name]


def transfers(lines: Lines, ours: Mapping[str, tuple[int, ...]], **names: Any) -> list[rules.Transfer]:
    """A family of these lines, expanded for a model of these tensors."""
    chosen = {name: value for name, value in names.items() if isinstance(value, tuple)}
    values = Values(names={k: v for k, v in names.items() if k not in chosen}, chosen=chosen)
    family = Family(
        name="odd",
        source="huggingface",
        model_type="odd",
        architectures=("Odd",),
        ignore=frozenset(),
        keys=(),
        fixed=(),
        patterns=(),
        tensors=tuple(tensor(line, "here") for line in lines),
    )
    plan = SimpleNamespace(tensors={name: Weight(name=name, shape=shape) for name, shape in ours.items()})
    spec: Any = SimpleNamespace(plan=plan)
    return rules.expand(family, spec, values)


def random(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def there_and_back(lines: Lines, ours: Mapping[str, tuple[int, ...]], **names: Any) -> dict[str, Tensor]:
    """Checks both round trips; gives what theirs are for random ours."""
    moves = transfers(lines, ours, **names)
    values = random(ours)
    theirs = dict(transfer.write(moves, values.__getitem__))
    again = dict(transfer.read(moves, Store(theirs), "odd"))
    assert again.keys() == values.keys()
    assert all(torch.equal(again[name], values[name]) for name in values)
    once_more = dict(transfer.write(moves, again.__getitem__))
    assert once_more.keys() == theirs.keys()
    assert all(torch.equal(once_more[name], theirs[name]) for name in theirs)
    assert all(value.is_contiguous() for value in (*theirs.values(), *again.values()))
    return {**theirs, **values}


sizes = st.integers(1, 5)


@settings(max_examples=25)
@given(sizes, sizes, sizes, sizes)
def test_fused_queries_keys_and_values_come_apart(heads: int, kv: int, width: int, hidden: int) -> None:
    ours = {"l.q": (heads * width, hidden), "l.k": (kv * width, hidden), "l.v": (kv * width, hidden)}
    found = there_and_back([{"theirs": "qkv", "ours": ["l.q", "l.k", "l.v"]}], ours)
    assert torch.equal(found["qkv"], torch.cat([found["l.q"], found["l.k"], found["l.v"]]))


@settings(max_examples=25)
@given(sizes, sizes, sizes)
def test_many_experts_are_one_stack(experts: int, inner: int, hidden: int) -> None:
    ours = {"f.gate": (experts, inner, hidden), "f.up": (experts, inner, hidden)}
    lines = [
        {"theirs": "experts.{e}.w1", "ours": "f.gate", "stack": {"e": "num_experts"}},
        {"theirs": "experts.{e}.w3", "ours": "f.up", "stack": {"e": "num_experts"}},
    ]
    found = there_and_back(lines, ours, num_experts=experts)
    assert all(torch.equal(found[f"experts.{e}.w3"], found["f.up"][e]) for e in range(experts))


@settings(max_examples=25)
@given(sizes, sizes, sizes)
def test_one_stack_becomes_experts_of_ours(experts: int, inner: int, hidden: int) -> None:
    ours = {f"f.{e}.gate": (inner, hidden) for e in range(experts)}
    line = {"theirs": "stacked", "ours": "f.{e}.gate", "stack": {"e": "n"}}
    assert there_and_back([line], ours, n=experts)["stacked"].shape == (experts, inner, hidden)


@settings(max_examples=25)
@given(sizes, sizes, sizes)
def test_fused_stacks_split_along_a_later_dimension(experts: int, inner: int, hidden: int) -> None:
    ours = {"f.gate": (experts, inner, hidden), "f.up": (experts, inner, hidden)}
    found = there_and_back([{"theirs": "gate_up", "ours": ["f.gate", "f.up"], "split": 1}], ours)
    assert torch.equal(found["gate_up"][:, :inner], found["f.gate"])
    fused = [{"theirs": "e{e}.gate_up", "ours": ["f.gate", "f.up"], "split": 1, "stack": {"e": "n"}}]
    with pytest.raises(DialectError, match="index of the stack"):
        transfers([{**fused[0], "ours": ["f.gate", "f.{e}.up"]}], {**ours, "f.0.up": (inner, hidden)}, n=1)
    assert there_and_back(fused, ours, n=experts)["e0.gate_up"].shape == (2 * inner, hidden)


@settings(max_examples=25)
@given(sizes, sizes, sizes)
def test_interleaved_and_transposed_parts_are_views(experts: int, inner: int, hidden: int) -> None:
    """Columns alternate gate and up, and inputs come before outputs."""
    ours = {"f.gate": (experts, inner, hidden), "f.up": (experts, inner, hidden)}
    line = {
        "theirs": "gate_up",
        "ours": ["f.gate", "f.up"],
        "split": 1,
        "shape": ["experts", "hidden", "2 * inner"],
        "view": ["experts", "hidden", "inner", 2],
        "permute": [0, 3, 2, 1],
    }
    found = there_and_back([line], ours, experts=experts, inner=inner, hidden=hidden)
    assert found["gate_up"].shape == (experts, hidden, 2 * inner)
    assert torch.equal(found["gate_up"][:, :, 0::2].transpose(1, 2), found["f.gate"])
    assert torch.equal(found["gate_up"][:, :, 1::2].transpose(1, 2), found["f.up"])


@settings(max_examples=25)
@given(sizes, sizes, sizes)
def test_rows_of_rotated_heads_are_reordered(heads: int, pairs: int, hidden: int) -> None:
    ours = {"l.q": (heads * pairs * 2, hidden)}
    line = {"theirs": "q", "ours": "l.q", "view": ["heads", "pairs", 2, "hidden"], "permute": [0, 2, 1, 3]}
    found = there_and_back([line], ours, heads=heads, pairs=pairs, hidden=hidden)
    interleaved = found["l.q"].reshape(heads, 2, pairs, hidden).transpose(1, 2).reshape(-1, hidden)
    assert torch.equal(found["q"], interleaved)


@settings(max_examples=25)
@given(sizes, sizes, sizes)
def test_unequal_parts_of_theirs_are_joined(a: int, b: int, hidden: int) -> None:
    line = {"theirs": ["x", "y"], "ours": "l.xy", "sizes": ["a", "b"]}
    found = there_and_back([line], {"l.xy": (a + b, hidden)}, a=a, b=b)
    assert (len(found["x"]), len(found["y"])) == (a, b)


def test_lines_hold_in_the_layers_of_a_pattern_and_beyond_the_last() -> None:
    lines = [
        {"theirs": "m.{l}.w", "ours": "layers.{l}.w", "when": "not sparse"},
        {"theirs": "m.{l}.router", "ours": "layers.{l}.router", "when": "sparse"},
        {"theirs": "m.{l+num_layers}.next", "ours": "predictor.{l}.w", "each": "depth"},
    ]
    ours = {"layers.0.w": (2,), "layers.1.router": (3,), "layers.2.router": (4,), "predictor.0.w": (5,)}
    found = there_and_back(lines, ours, num_layers=3, depth=1, sparse=(False, True, True))
    assert {"m.0.w", "m.1.router", "m.2.router", "m.3.next"} <= found.keys()


TIED: Lines = [
    {"theirs": "embed", "ours": "embedding"},
    {"theirs": "head", "same_as": "embed", "when": "tied"},
    {"theirs": "head", "ours": "head", "when": "not tied"},
]


def test_a_tied_head_may_be_absent_or_an_equal_copy() -> None:
    moves = transfers(TIED, {"embedding": (3, 2)}, tied=True)
    embed = torch.randn(3, 2)
    for theirs in ({"embed": embed}, {"embed": embed, "head": embed.clone()}):
        assert [name for name, _ in transfer.read(moves, Store(theirs), "odd")] == ["embedding"]
    assert dict(transfer.write(moves, lambda _: embed)).keys() == {"embed"}
    changed = embed.clone()
    changed[0, 0] += 1
    with pytest.raises(DialectError, match="head: must equal embed"):
        dict(transfer.read(moves, Store({"embed": embed, "head": changed}), "odd"))


def test_a_copy_that_the_family_stores_is_written_again() -> None:
    lines = [TIED[0], {**TIED[1], "copy": True}]
    embed = torch.randn(3, 2)
    written = dict(transfer.write(transfers(lines, {"embedding": (3, 2)}, tied=True), lambda _: embed))
    assert torch.equal(written["head"], embed)
    assert written["head"].data_ptr() != written["embed"].data_ptr()


def test_everything_that_does_not_fit_is_told_at_once() -> None:
    lines = [
        *({"theirs": name, "ours": name} for name in ("a", "b", "c")),
        {"theirs": "inv_freq.{l}", "drop": "follows from the config"},
    ]
    moves = transfers(lines, {"a": (2,), "b": (2, 3), "c": (1,)}, num_layers=2)
    store = Store(
        {"a": torch.zeros(2), "b": torch.zeros(3, 2), "odd": torch.zeros(1), "inv_freq.1": torch.zeros(1)}
    )
    with pytest.raises(DialectError) as caught:
        transfer.read(moves, store, "odd")
    assert caught.value.lines == (
        "c: is missing",
        "b: has shape (3, 2), odd wants (2, 3)",
        "odd: is unexpected, odd has no place for it",
    )
    assert store.loaded == []


def test_a_long_list_of_misfits_is_cut_and_counted() -> None:
    moves = transfers([{"theirs": "a", "ours": "a"}], {"a": (1,)})
    store = Store({"a": torch.zeros(1)} | {f"extra{i}": torch.zeros(1) for i in range(50)})
    with pytest.raises(DialectError) as caught:
        transfer.read(moves, store, "odd")
    assert len(caught.value.lines) == 21
    assert caught.value.lines[-1] == "... and 30 more, 50 in all"


def test_tensors_are_loaded_one_line_and_layer_at_a_time() -> None:
    ours = {f"l.{i}.{name}": (1, 1) for i in range(3) for name in ("q", "k")}
    moves = transfers([{"theirs": "{l}.qk", "ours": ["l.{l}.q", "l.{l}.k"]}], ours, num_layers=3)
    store = Store({f"{i}.qk": torch.zeros(2, 1) for i in range(3)})
    reading = transfer.read(moves, store, "odd")
    assert next(reading)[0] == "l.0.q"
    assert store.loaded == ["0.qk"]


def test_a_number_of_tensors_that_no_model_has_is_refused_before_they_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = {"theirs": "e.{e}", "ours": "w", "stack": {"e": "n"}}
    with pytest.raises(DialectError, match="more than 1000000 tensors"):
        transfers([stack], {"w": (10**15, 1)}, n=10**15)
    layers = {**stack, "theirs": "{l}.e.{e}", "ours": "w.{l}"}
    monkeypatch.setattr(rules, "MAX_TENSORS", 10)
    assert len(transfers([layers], {"w.0": (5, 1), "w.1": (5, 1)}, num_layers=2, n=5)) == 2
    with pytest.raises(DialectError, match="more than 10 tensors"):
        transfers([layers], {f"w.{i}": (4, 1) for i in range(3)}, num_layers=3, n=4)


def refused(lines: Lines, ours: Mapping[str, tuple[int, ...]], **names: Any) -> Callable[[], object]:
    return lambda: transfers(lines, ours, **names)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (refused([{"theirs": "a", "ours": "a"}], {"a": (1,), "b": (1,)}), "b: odd has no tensor for it"),
        (refused([{"theirs": "a", "ours": "a"}] * 2, {"a": (1,)}), "two lines"),
        (refused([{"theirs": "a", "ours": "z"}], {"a": (1,)}), "no tensor z"),
        (refused([{"theirs": "a", "ours": "a", "view": [3]}], {"a": (2,)}), "do not hold"),
        (refused([{"theirs": "a", "ours": "a", "permute": [1, 0]}], {"a": (2,)}), "permute"),
        (refused([{"theirs": ["a", "b"], "ours": "a", "sizes": [1, 2]}], {"a": (2,)}), "do not make 2"),
        (refused([{"theirs": "a", "ours": ["a", "b"]}], {"a": (1, 2), "b": (1, 3)}), "do not join"),
        (refused([{"theirs": "a", "ours": "a", "spilt": 1}], {}), "did you mean 'split'"),
        (refused([{"theirs": "a"}], {}), "needs one of"),
        (refused([{"theirs": "a", "ours": "a", "stack": 3}], {}), "stack must be"),
        (refused([{"theirs": "a", "ours": "a", "permute": [0, 2]}], {}), "order of dimensions"),
    ],
)
def test_a_line_that_can_not_be_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(DialectError, match=words):
        make()
