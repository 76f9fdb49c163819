"""Conventions of tensors: orders are orders, what built-in parts state fits their tensors, and means what it says."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import composeformer as cf
from composeformer.assemble import fill, skeleton
from composeformer.contracts import SLOTS
from composeformer.conventions import (
    Convention,
    Order,
    Swap,
    after,
    exchanged,
    gathered,
    interleaved,
    inverse,
    transposed,
    widened,
    wrong,
)
from composeformer.plan import Node
from composeformer.spec import Spec
from composeformer.spec.inherit import shipped
from composeformer.store import verify

SIZES = st.integers(1, 12)


@given(first=SIZES, second=SIZES, third=SIZES)
def test_every_helper_gives_an_order(first: int, second: int, third: int) -> None:
    for found, size in (
        (transposed(first, second), first * second),
        (interleaved(2 * first), 2 * first),
        (exchanged(first, second), first + second),
        (after(first, transposed(second, third)), first + second * third),
        (widened(transposed(first, second), third), first * second * third),
        (gathered(first, second, third), first * (second + third)),
    ):
        assert sorted(found) == list(range(size))


@given(order=st.permutations(range(9)))
def test_an_order_and_its_inverse_cancel(order: list[int]) -> None:
    x = torch.randn(9)
    assert torch.equal(x[list(order)][list(inverse(order))], x)
    assert torch.equal(x[list(inverse(order))][list(order)], x)


@given(rows=SIZES, columns=SIZES, width=SIZES)
def test_a_transposed_order_is_a_transposed_matrix(rows: int, columns: int, width: int) -> None:
    x = torch.randn(rows * columns)
    assert torch.equal(x[list(transposed(rows, columns))], x.view(rows, columns).T.flatten())
    blocks = torch.randn(rows * columns, width)
    order = widened(transposed(rows, columns), width)
    assert torch.equal(blocks.flatten()[list(order)], blocks[list(transposed(rows, columns))].flatten())


@given(blocks=SIZES, first=SIZES, second=SIZES)
def test_gathered_and_exchanged_are_cuts_of_blocks(blocks: int, first: int, second: int) -> None:
    x = torch.randn(blocks, first + second)
    a, b = x.split([first, second], -1)
    assert torch.equal(
        x.flatten()[list(gathered(blocks, first, second))], torch.cat([a.flatten(), b.flatten()])
    )
    assert torch.equal(x[:, list(exchanged(first, second))], torch.cat([b, a], -1))


def stated(node: Node) -> tuple[list[Convention], Mapping[str, tuple[int, ...]]]:
    start = len(node.path) + 1
    shapes = {name[start:]: weight.shape for below in node.walk() for name, weight in below.tensors()}
    return list(node.part.config.conventions(node.site)), shapes


def test_what_parts_of_shipped_specs_state_fits_their_tensors() -> None:
    seen = set()
    for name in shipped():
        spec = Spec.load(name)
        for node in spec.plan.nodes():
            if (node.part, node.site.width, bool(node.site.sublayers)) in seen:
                continue
            seen.add((node.part, node.site.width, bool(node.site.sublayers)))
            for convention in stated(node)[0]:
                assert list(wrong(convention, stated(node)[1])) == [], (name, node.path)
                assert convention.changes
                assert convention.usual != convention.other
    slots = {part.slot for part, _, _ in seen}
    assert slots <= set(SLOTS)
    assert {"mixer", "ffn", "norm", "residual", "predictor"} <= slots


def moved(state: Mapping[str, Tensor], path: str, convention: Convention) -> dict[str, Tensor]:
    """The tensors as the other way has them."""
    found = dict(state)
    for change in convention.changes:
        if isinstance(change, Swap):
            first, second = f"{path}.{change.first}", f"{path}.{change.second}"
            found[first], found[second] = found[second], found[first]
        elif isinstance(change, Order):
            name = f"{path}.{change.tensor}"
            blocks = found[name].movedim(change.dim, 0).unflatten(0, (-1, len(change.indices)))
            found[name] = blocks[:, list(change.indices)].flatten(0, 1).movedim(0, change.dim)
    return found


@pytest.mark.parametrize("layout", ["half-split", "interleaved"])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tiny-llama", {"mixer.attention.qkv_bias": True, "mixer.attention.qk_norm": "rms"}),
        ("tiny-llama", {"position.rope.fraction": 0.5}),
        ("tiny-deepseek-v3", {"mixer.mla.attention_bias": True}),
        ("tiny-deepseek-v3", {"mixer.mla.q_lora_rank": None}),
    ],
)
def test_the_other_rotary_layout_with_its_tensors_is_the_same_function(
    name: str, more: dict[str, Any], layout: str
) -> None:
    data = Spec.load(name).with_({"position.rope.layout": layout, "model.init_std": 0.3}).to_dict()
    for path, value in more.items():
        slot, part, field = path.split(".")
        data[slot][part][field] = value
        if value is None:
            del data[slot][part][field]
    spec = Spec.from_dict(data)
    model = cf.build(spec, seed=0)
    with torch.no_grad():  # ones and zeros would be the same in any order
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    state = model.state_dict()
    for node in spec.plan.nodes():
        if node.slot == "mixer":
            for convention in stated(node)[0]:
                if convention.name == "rotary layout":
                    assert convention.usual == layout
                    other = convention.other
                    state = moved(state, node.path, convention)
    turned = skeleton(spec.with_({"position.rope.layout": other}))
    fill(turned, [(n, state[n]) for n in turned.spec.plan.tensors], "cpu")
    verdict = verify(turned, model, tokens=24, bisect=True)
    assert max(each.relative or 0.0 for each in verdict.outputs if each.where.count(".") < 3) <= 1e-5
    assert verdict.explanation is not None
    assert verdict.explanation.complete
    assert not verdict.explanation.steps
    # Either of the two alone is another function.
    assert verify(turned, cf.build(spec.with_({"position.rope.layout": other}), seed=0)).first is not None
