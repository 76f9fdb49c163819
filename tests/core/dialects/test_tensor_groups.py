"""Groups of a stack are read and written alone, through any line, and are what the whole holds there."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from composeformer.dialects import transfer
from composeformer.dialects.transfer import Lookup

from .test_tensor_lines import Lines, Store, random, transfers

STACKED: Lines = [{"theirs": "x.{e}.up", "ours": "f.up", "stack": {"e": "n"}}]
FUSED: Lines = [{"theirs": "x.{e}.both", "ours": ["f.gate", "f.up"], "split": 1, "stack": {"e": "n"}}]
WHOLE: Lines = [{"theirs": "x.both", "ours": ["f.gate", "f.up"], "split": 1}]
TURNED: Lines = [
    {"theirs": "x.{e}.up", "ours": "f.up", "stack": {"e": "n"}, "shape": ["n", "i", "o"], "permute": [0, 2, 1]}
]
APART: Lines = [{"theirs": "x.up", "ours": "f.{e}.up", "stack": {"e": "n"}}]
BIASES: Lines = [{"theirs": "x.{e}.bias", "ours": "f.bias", "stack": {"e": "n"}}]
SHAPES = {
    "stacked": (STACKED, ("f.up",)),
    "fused": (FUSED, ("f.gate", "f.up")),
    "whole": (WHOLE, ("f.gate", "f.up")),
    "turned": (TURNED, ("f.up",)),
}


class Sliced(Store):
    """A source that can slice, and notes how much it gave."""

    def get_slice(self, name: str) -> Any:
        outer = self

        class View:
            def __getitem__(self, groups: slice) -> Tensor:
                found = outer.tensors[name][groups]
                outer.loaded.append(f"{name}:{len(found)}")
                return found

        return View()


Made = tuple[Any, Mapping[str, Tensor], dict[str, Tensor]]


def made(lines: Lines, names: tuple[str, ...], n: int, o: int, i: int) -> Made:
    """Transfers, tensors of ours, and what theirs are."""
    ours = dict.fromkeys(names, (n, o, i))
    moves = transfers(lines, ours, n=n, o=o, i=i)
    values = random(ours)
    return moves, values, dict(transfer.write(moves, values.__getitem__))


@settings(max_examples=30)
@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.data())
def test_groups_are_slices_of_the_whole(kind: str, n: int, o: int, i: int, data: st.DataObject) -> None:
    moves, values, theirs = made(*SHAPES[kind], n, o, i)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    for source in (Store(theirs), Sliced(theirs)):
        get = transfer.lookup(moves, source, "odd")
        for name, value in values.items():
            part = get(name, groups=(start, stop))
            assert torch.equal(part, value[start:stop])
            assert part.is_contiguous()
            assert torch.equal(get(name), value)


def test_nothing_else_of_a_stack_is_read() -> None:
    moves, _, theirs = made(STACKED, ("f.up",), 5, 2, 3)
    source = Sliced(theirs)
    transfer.lookup(moves, source, "odd")("f.up", groups=(1, 3))
    assert source.loaded == ["x.1.up", "x.2.up"]
    moves, _, theirs = made(WHOLE, ("f.gate", "f.up"), 5, 2, 3)
    source = Sliced(theirs)
    transfer.lookup(moves, source, "odd")("f.gate", groups=(1, 3))
    assert source.loaded == ["x.both:2"]


@settings(max_examples=30)
@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_writing_from_a_lookup_is_writing_from_the_whole(kind: str, n: int, o: int, i: int) -> None:
    moves, values, theirs = made(*SHAPES[kind], n, o, i)
    asked: list[object] = []

    def find(name: str, groups: tuple[int, int] | None) -> Tensor:
        asked.append(groups)
        return values[name] if groups is None else values[name][slice(*groups)]

    again = dict(transfer.write(moves, Lookup(find)))
    assert list(again) == list(theirs)
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)
    if kind in ("stacked", "fused"):
        assert None not in asked
        assert len(asked) == n * len(values)


def test_a_stack_that_is_apart_on_our_side_has_no_groups() -> None:
    ours = {f"f.{e}.up": (2, 3) for e in range(4)}
    moves = transfers(APART, ours, n=4)
    values = random(ours)
    theirs = dict(transfer.write(moves, Lookup(lambda name, _: values[name])))
    get = transfer.lookup(moves, Store(theirs), "odd")
    assert all(torch.equal(get(name), value) for name, value in values.items())
    assert torch.equal(get("f.1.up", groups=(0, 1)), values["f.1.up"][:1])


def test_biases_of_groups_are_slices_too() -> None:
    moves = transfers(BIASES, {"f.bias": (4, 3)}, n=4)
    values = random({"f.bias": (4, 3)})
    theirs = dict(transfer.write(moves, Lookup(lambda name, groups: values[name])))
    assert torch.equal(transfer.lookup(moves, Store(theirs), "odd")("f.bias", groups=(1, 3)), values["f.bias"][1:3])


@pytest.mark.parametrize("wide", [0, 2])
def test_a_stack_of_several_dtypes_holds_each_number(wide: int) -> None:
    moves, _, theirs = made(STACKED, ("f.up",), 4, 2, 3)
    mixed = {name: value.bfloat16() for name, value in theirs.items()} | {f"x.{wide}.up": theirs[f"x.{wide}.up"]}
    found = transfer.lookup(moves, Store(mixed), "odd")("f.up")
    assert found.dtype == torch.float32
    assert all(torch.equal(found[e], mixed[f"x.{e}.up"].float()) for e in range(4))
