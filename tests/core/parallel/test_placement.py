"""Which process holds what: expert groups in order, everything stored of a stack, the same values as in one process."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import composeformer as cf
from composeformer.assemble import Builder
from composeformer.contracts import Constant, Linear, Normal, Weight
from composeformer.errors import InputError
from composeformer.filling import check_room, places
from composeformer.init import initial
from composeformer.parallel import Placement, World, place
from composeformer.parallel.pieces import is_shard, local, span
from composeformer.parallel.sharding import shard
from composeformer.spec import Spec
from composeformer.testing.ranks import on_ranks
from composeformer.train import trained, trainer

from .conftest import raw, spec

EXPERTS = 8
STACK = "layers.1.ffn.up.weight"
MAPS = ("gate", "up", "down")


@settings(deadline=None)
@given(st.sampled_from([(1, 1), (2, 1), (2, 2), (8, 1), (8, 2), (8, 4), (8, 8)]))
def test_each_expert_group_holds_every_expert_once_in_order(layout: tuple[int, int]) -> None:
    size, experts = layout
    found = spec(experts)
    worlds = [World(rank=rank, size=size, experts=experts) for rank in range(size)]
    assert [world.outer_rank for world in worlds] == sorted(world.outer_rank for world in worlds)
    for number in range(size // experts):
        held: list[int] = []
        for world in worlds:
            if world.outer_rank == number:
                part = Placement(spec=found, world=world).groups(STACK)
                held += range(EXPERTS)[slice(None) if part is None else part]
        assert held == list(range(EXPERTS))


def test_codes_scales_and_biases_go_with_their_experts_and_nothing_else_does() -> None:
    data = Spec.load("tiny-deepseek-v3").to_dict()
    coded = Spec.from_dict({**data, "precision": {"kind": "fp8-block", "weights": "float8_e4m3fn"}})
    placement = Placement(spec=coded, world=World(rank=1, size=4, experts=4))
    stored = coded.formats.stored
    cut = {name for name in stored if placement.groups(name) is not None}
    assert cut == {name for name, weight in stored.items() if len(weight.shape) == 3}
    assert f"{STACK}_scale_inv" in cut
    for name in cut:
        assert placement.here(name, stored[name]).shape == (4, *stored[name].shape[1:])
    biased = Linear(name="up", inputs=3, outputs=2, groups=8, bias=True, shard="group")
    assert [weight.shape for weight in placement.linear(biased).weights] == [(2, 2, 3), (2, 2)]
    apart = Linear(name="up", inputs=3, outputs=2, shard="out")
    assert placement.linear(apart) is apart


@given(
    groups=st.integers(1, 6),
    seed=st.integers(0, 3),
    init=st.sampled_from([None, Normal(0.5), Constant(2.0)]),
    ends=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_some_groups_are_drawn_as_among_all(
    groups: int, seed: int, init: Normal | Constant | None, ends: tuple[int, int]
) -> None:
    weight = Weight(name="w", shape=(groups, 2, 3), init=init)
    part = slice(*sorted(min(end, groups) for end in ends))
    whole = initial("a.w", weight, seed, 0.1)
    assert raw(initial("a.w", weight, seed, 0.1, part)) == raw(whole[part])


@given(rows=st.integers(0, 40), size=st.integers(1, 9))
def test_shards_are_cut_as_pytorch_cuts(rows: int, size: int) -> None:
    chunks = torch.arange(rows).chunk(size) if rows else ()
    for rank in range(size):
        start, stop = span(rows, size, rank)
        wanted = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(range(rows))[start:stop] == wanted


def test_scalars_and_what_two_units_share_are_not_sharded() -> None:
    def run(rank: int) -> set[str]:
        placement = place(spec(2))
        model = Builder(placement.spec, "cpu", Placement(spec=placement.spec, world=placement.world)).model()
        layers: Any = model.layers
        layers[1].residual.mixer_norm.weight = layers[0].residual.mixer_norm.weight
        layers[0].ffn.temperature = torch.nn.Parameter(torch.empty((), device="meta"))
        shard(model, placement)
        return {name for name, p in model.named_parameters(remove_duplicate=False) if not is_shard(p)}

    stacks = {f"{path}.ffn.{name}.weight" for path in ("layers.1", "predictor.depths.0") for name in MAPS}
    shared = {f"layers.{number}.residual.mixer_norm.weight" for number in (0, 1)}
    assert on_ranks(2, run) == [stacks | shared | {"layers.0.ffn.temperature"}] * 2


def test_one_process_holds_all_experts_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "composeformer.parallel"):
        model = cf.build(spec(4), device="meta")
    assert model.state_dict()[STACK].shape[0] == EXPERTS
    assert caplog.messages == ["parallel.expert = 4: there is one process, which holds all experts"]
    assert not model.placement.spread


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_on_the_meta_device_has_the_shapes_of_this_process(sharded: bool) -> None:
    def run(rank: int) -> tuple[bool, tuple[int, ...], tuple[int, ...], bool, list[str]]:
        model = cf.build(spec(2, sharded), device="meta")
        state = model.state_dict()
        norm = state["residual.norm.weight"]
        there = all(local(tensor).is_meta for tensor in state.values())
        return there, tuple(state[STACK].shape), tuple(local(norm).shape), is_shard(norm), list(state)

    names = list(cf.build(spec(), device="meta").state_dict())
    for found in on_ranks(2, run):
        assert found == (True, (4, 8, 16), (8 if sharded else 16,), sharded, names)


def test_memory_is_checked_for_what_a_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rank: int) -> tuple[int, str]:
        model = cf.build(spec(2), device="meta")
        need = sum(local(tensor).nbytes for tensor, _ in places(model).values())
        monkeypatch.setattr("composeformer.filling.memory", lambda device: 2 * need)
        check_room(places(model), "cpu")
        monkeypatch.setattr("composeformer.filling.memory", lambda device: 2 * need - 1)
        with pytest.raises(InputError) as caught:
            check_room(places(model), "cpu")
        return need, str(caught.value)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    all_of_it = sum(tensor.nbytes for tensor, _ in places(cf.build(spec(), device="meta")).values())
    found = on_ranks(2, run)
    # Both together hold everything, the router's bias twice.
    assert all_of_it <= sum(need for need, _ in found) < 1.01 * all_of_it
    for _, told in found:
        assert "GB of tensors in each of 2 processes are more than" in told


def test_an_optimizer_keeps_shards_and_whole_tensors_apart_and_its_state_local() -> None:
    def run(rank: int) -> list[tuple[float, set[bool], bool]]:
        model = cf.build(spec(2))
        _, optimizer = trainer(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        found = []
        for group in optimizer.param_groups:
            shapes = all(
                local(optimizer.state[p]["exp_avg"]).shape == local(p).shape for p in group["params"]
            )
            found.append((group["weight_decay"], {is_shard(p) for p in group["params"]}, shapes))
        assert {one.is_shard for one in trained(model)} == {False, True}
        return found

    wanted = [(0.1, {False}, True), (0.1, {True}, True), (0.0, {True}, True)]
    assert on_ranks(2, run) == [wanted, wanted]
