"""What can not be run by several processes is one line, in all of them, before anything hangs."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import composeformer as cf
from composeformer import plugins
from composeformer.decoder import Model
from composeformer.errors import ComposeError, InputError
from composeformer.exchange import CommError
from composeformer.parallel import start, stop
from composeformer.tensors import Aux, Batch, Output
from composeformer.testing.ranks import RanksFailed, on_ranks
from composeformer.train import train_step, trainer

from .conftest import VOCAB, Rows, spec

BATCH = Rows(2, 5, 0, False, 0)


def told(size: int, call: Callable[[int], Any]) -> tuple[str, ...]:
    """The lines of the error that every one of so many processes ends with."""

    def run(rank: int) -> tuple[str, ...]:
        with pytest.raises(ComposeError) as caught:
            call(rank)
        return caught.value.lines

    lines = on_ranks(size, run, timeout=30)
    assert lines == [lines[0]] * size
    return lines[0]


def test_processes_that_are_no_whole_expert_groups() -> None:
    lines = told(3, lambda rank: cf.build(spec(2)))
    assert lines == ("python: parallel.expert = 2: must divide the number of processes, 3",)


def test_a_comparison_of_which_each_process_would_see_a_part() -> None:
    def compare(rank: int) -> None:
        model = cf.build(spec(2))
        cf.verify(model, model)

    assert told(2, compare) == ("verify compares the models of one process, and there are 2",)


def test_a_backend_for_one_process() -> None:
    alone = "moves tokens within one process, and parallel.expert is 2; several need collective, hierarchical"
    assert told(2, lambda rank: cf.build(spec(2, kind="local"))) == (f'python: comm.kind = "local": {alone}',)
    dense = {"layers": [{"ffn": "dense"}], "predictor.layer": {"ffn": "dense"}}
    shapes = on_ranks(
        2, lambda rank: cf.build(spec(2, kind="local").with_(dense), device="meta").placement.spread
    )
    assert shapes == [True, True]


def test_processes_that_would_build_different_models() -> None:
    said = "the processes differ in {}, so they can not build one model: process 0 has {}, process 1 {}"

    def other_spec(rank: int) -> Model:
        return cf.build(spec(2, ffn__experts__router__top_k=1 + rank), device="meta")

    def other_run(rank: int) -> Model:
        return cf.build(spec(2, train__learning_rate=0.5 + rank), device="meta")

    def other_plugins(rank: int) -> Model:
        found = spec(2)
        if rank:
            plugins.configure(blocked=["fp8"])
        return cf.build(found, device="meta")

    assert told(2, other_spec) == (said.format("the spec", '"top_k = 1"', '"top_k = 2"'),)
    rates = '"learning_rate = 0.5"', '"learning_rate = 1.5"'
    assert told(2, other_run) == (said.format("the spec", *rates),)
    assert told(2, lambda rank: cf.build(spec(2), seed=rank)) == (said.format("the seed", '"0"', '"1"'),)
    # Three processes are no whole groups of two; the last alone would build, and wait for ever.
    (line,) = told(3, lambda rank: cf.build(spec(1 if rank == 2 else 2), device="meta"))
    assert line == said.format("the spec", '"expert = 2"', '"expert = 1"').replace("process 1", "process 2")
    fp8 = next(info for info in plugins.current().infos if info.name == "fp8")
    parts = sorted(f"{part.slot} {part.kind} of composeformer {fp8.version}" for part in fp8.components)
    shown = [said.format("their plugins", f'"{part}, revision 1"', "nothing") for part in parts]
    assert told(2, other_plugins) == tuple(shown)


@pytest.mark.parametrize(("numbers", "said"), [((1, 2), "between 1 and 2"), ((0, 1), "between 0 and 1")])
def test_other_numbers_of_micro_batches(numbers: tuple[int, int], said: str) -> None:
    def step(rank: int) -> None:
        model = cf.build(spec(2))
        train_step(model, [BATCH.batch()] * numbers[rank], *trainer(model), step=0)

    (line,) = told(2, step)
    assert line == (
        f"processes bring {said} micro-batches to a step: must be the same number, of padding where need be"
    )


def test_a_batch_that_one_process_can_not_take_ends_all_and_the_next_step_goes_on() -> None:
    def run(rank: int) -> tuple[tuple[str, ...], str | None]:
        model = cf.build(spec(2))
        parts = trainer(model)
        bad = BATCH.batch()
        if rank:
            bad.ids[1, 3] = VOCAB
        with pytest.raises(InputError) as caught:
            train_step(model, [BATCH.batch(), bad], *parts, step=0)
        return caught.value.lines, train_step(model, [BATCH.batch()], *parts, step=0).skipped

    line = f"process 1: token id {VOCAB} at row 1, position 3: must be 0 to {VOCAB - 1}"
    assert on_ranks(2, run) == [((line,), None)] * 2


def test_no_micro_batch_anywhere() -> None:
    def step(rank: int) -> None:
        model = cf.build(spec(2))
        train_step(model, [], *trainer(model), step=0)

    assert told(2, step) == ("a training step needs at least one batch",)


def test_a_part_that_tells_other_things_on_one_rank() -> None:
    def step(rank: int) -> None:
        model = cf.build(spec(2))
        ffn: Any = model.layers[0].ffn
        plain = ffn.forward

        def forward(x: torch.Tensor, batch: Batch) -> Output:
            output = plain(x, batch)
            return Output(output.hidden, Aux({f"layers.0.ffn.own_{rank}": output.hidden.sum() * 0}))

        ffn.forward = forward
        train_step(model, [BATCH.batch()], *trainer(model), step=0)

    (line,) = told(2, step)
    assert line.startswith("the processes differ in the losses that parts tell, so they can not end a step: ")


def test_a_launcher_that_does_not_say_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError) as caught:
        cf.build(spec(2), device="meta")
    assert caught.value.lines == (
        "WORLD_SIZE = 2, but there is no RANK, MASTER_ADDR, MASTER_PORT: processes are started by torchrun, or must "
        "say where they meet",
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WORLD_SIZE", "two", 'WORLD_SIZE = "two": must be an integer >= 1, as torchrun sets it'),
        ("WORLD_SIZE", "0", 'WORLD_SIZE = "0": must be an integer >= 1, as torchrun sets it'),
        ("RANK", "-1", 'RANK = "-1": must be an integer >= 0 and < WORLD_SIZE (2), as torchrun sets it'),
        ("RANK", "2", 'RANK = "2": must be an integer >= 0 and < WORLD_SIZE (2), as torchrun sets it'),
        ("MASTER_PORT", "near", 'MASTER_PORT = "near": must be an integer >= 0, as torchrun sets it'),
    ],
)
def test_an_environment_that_is_no_launchers(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    right = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for each, held in (right | {name: value}).items():
        monkeypatch.setenv(each, held)
    with pytest.raises(InputError) as caught:
        start()
    assert caught.value.lines == (said,)


def test_a_place_to_meet_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        where = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(CommError) as caught:
            start()
    (line,) = caught.value.lines
    assert line.startswith(f"process 0 of 2: meeting at 127.0.0.1:{port} over gloo, failed after ")
    assert not dist.is_initialized()


def test_a_device_for_which_the_program_did_not_let_processes_meet(tmp_path: Path) -> None:
    def run(rank: int) -> str:
        dist.init_process_group("cuda:gloo", init_method=f"file://{tmp_path / 'met'}", rank=rank, world_size=2)
        with pytest.raises(InputError) as caught:
            cf.build(spec(2), device="meta")
        return str(caught.value)

    said = "device = meta: the program let processes meet for cuda alone, by init_process_group"
    assert on_ranks(2, run, gloo=False) == [said] * 2


@pytest.mark.parametrize("where", ["loss", "step"])
def test_a_process_that_ends_in_a_step_ends_the_others_with_a_line(where: str, tmp_path: Path) -> None:
    """After its forward passes, or after its backward passes."""

    def run(rank: int) -> None:
        model = cf.build(spec(1, shard=False))
        objective, optimizer = trainer(model)
        if rank == 1 and where == "loss":
            objective = Leaves(objective)
        if rank == 1 and where == "step":
            leave = lambda *_: os._exit(3)  # noqa: E731
            next(iter(model.parameters())).register_post_accumulate_grad_hook(leave)
        with pytest.raises(CommError) as caught:
            train_step(model, [BATCH.batch()], objective, optimizer, step=0)
        (tmp_path / str(rank)).write_text("|".join(caught.value.lines))

    with pytest.raises(RanksFailed, match=r"^rank 1 died with exit code 3$"):
        on_ranks(2, run, timeout=30)
    line = (tmp_path / "0").read_text()
    assert line.startswith("process 0 of 2: the maximum of torch.int32 (")
    assert "failed after" in line


class Leaves:
    """An objective that ends its process."""

    def __init__(self, objective: Any) -> None:
        self.weight = objective.weight

    def __call__(self, *_: object) -> None:
        os._exit(3)


def test_a_device_by_number() -> None:
    (line,) = told(2, lambda rank: cf.build(spec(2), device="cpu:0"))
    assert line == "device = cpu:0: each of several processes has a device of its own; name the kind alone"


def test_a_device_on_which_processes_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "::1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError, match=r"^device = mps: no way for processes to meet; there are cpu, cuda$"
    ):
        start("mps")
    monkeypatch.setattr(dist, "is_backend_available", lambda backend: False)
    with pytest.raises(
        InputError, match=r"^device = cpu: processes on cpu meet over gloo, which this build of"
    ):
        start()


def test_processes_meet_where_the_environment_says_and_part() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(rank: int) -> list[Any]:
        where = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), **where}
        world = cf.build(spec(2), device="meta").placement.world
        with pytest.raises(InputError) as caught:
            start("cuda")
        stop()
        return [(world.rank, world.size, world.experts), dist.is_initialized(), str(caught.value)]

    met = "device = cuda: processes have met over gloo for the cpu; composeformer.parallel.stop() parts them"
    assert on_ranks(2, run, gloo=False) == [[(0, 2, 2), False, met], [(1, 2, 2), False, met]]


def test_one_process_needs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    start()
    stop()
    assert not dist.is_initialized()
    assert cf.build(spec(2), device="meta").placement.world.size == 1
