"""Every rank runs the same collectives in the same order, and one that is left out says so, in one line."""

import time
from datetime import timedelta

import pytest
import torch
import torch._dynamo  # by checkpointing; once, before ranks are forked
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from composeformer.exchange import CommError
from composeformer.tensors import Routing
from composeformer.testing.ranks import RanksFailed, on_ranks
from composeformer_comm import transport
from composeformer_comm.config import Collective
from composeformer_comm.remote import RemoteExchange

KINDS = ["collective", "collective, once per rank", "hierarchical"]


class Recorder:
    """Writes down each collective as it starts: what is alike on all ranks."""

    def __init__(self, monkeypatch):
        self.calls = []
        real = dist.all_to_all_single

        def recorded(output, tensor, *args, **kwargs):
            self.calls.append((str(tensor.dtype), tuple(tensor.shape[1:])))
            return real(output, tensor, *args, **kwargs)

        monkeypatch.setattr(dist, "all_to_all_single", recorded)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_collectives_in_the_same_order_whatever_happens_on_a_rank(lab, kind, monkeypatch):
    """Rank 0 has no token, rank 1 nothing that needs a gradient, rank 2 gets all rows, on rank 3 experts answer
    without a graph; two exchanges follow each other, the second recomputed in the backward pass.
    """
    config = lab.configs[kind](4)

    def run(rank):
        recorder = Recorder(monkeypatch)
        tokens = [0, 3, 5, 2][rank]
        x = torch.ones(tokens, 4, requires_grad=rank != 1)
        weights = torch.ones(tokens, 2, requires_grad=rank not in (1, 2))
        routing = Routing(torch.tensor([[4, 5]] * tokens, dtype=torch.int64).view(tokens, 2), weights)
        exchanges = [RemoteExchange(config, lab.experts, dist.group.WORLD) for _ in range(2)]

        def experts(rows, counts):
            return rows.detach() if rank == 3 else rows * 2

        y, _ = exchanges[0].exchange(x, routing, experts)

        def second(y):
            return exchanges[1].exchange(y, routing, experts)[0]

        with set_checkpoint_early_stop(False):
            y = checkpoint(second, y, use_reentrant=False)
        assert y.requires_grad
        (y.sum() * (0.0 if rank == 1 else 1.0)).backward()
        return recorder.calls, [step for step, _ in exchanges[0].ledger.steps()]

    found = on_ranks(4, run, timeout=30)
    assert all(each == found[0] for each in found)
    calls, steps = found[0]
    # Both forward, then the second's forward again, then both backward.
    hops = len(config.hops(4))
    assert len(steps) == 5 * hops
    assert len(calls) == 3 * 3 * hops + 2 * 2 * hops


@pytest.mark.parametrize("kind", KINDS)
def test_beside_is_computed_once_while_rows_travel(lab, kind, monkeypatch):
    config = lab.configs[kind](2)

    def run(rank):
        recorder = Recorder(monkeypatch)
        shared = torch.full((4,), 3.0, requires_grad=True)
        x = torch.ones(2, 3, 4, requires_grad=True)
        routing = Routing(torch.tensor([[0, 7]]).expand(2, 3, 2), torch.ones(2, 3, 2))
        seen = []

        def beside():
            seen.append(len(recorder.calls))
            return x * shared

        exchange = RemoteExchange(config, lab.experts, dist.group.WORLD)
        y, given = exchange.exchange(x, routing, lambda rows, counts: rows * 2, beside)
        assert y.shape == x.shape
        gradients = torch.autograd.grad((y + given).sum(), [x, shared])
        return seen, y.detach(), *gradients

    for seen, y, to_x, to_shared in on_ranks(2, run):
        assert seen == [2]  # counts are told and the first rows have left; nothing else has
        assert (y == 4).all()
        assert (to_x == 7).all()
        assert (to_shared == 6).all()


def joined(rank, folder, seconds):
    """A process group of two whose collectives give up after some seconds."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=seconds)
    )


def one_exchange(lab, group, tokens=2):
    x = torch.ones(tokens, 4, requires_grad=True)
    routing = Routing(torch.tensor([[0, 7]] * tokens), torch.ones(tokens, 2))
    return RemoteExchange(Collective(), lab.experts, group).exchange(x, routing, lambda rows, counts: rows)[0]


@pytest.mark.parametrize("leaves", ["exits", "waits elsewhere"])
def test_a_rank_left_alone_names_itself_the_collective_and_the_sizes(lab, leaves, tmp_path):
    """In the forward pass rank 1 is not there at all; its place is known within seconds."""

    def run(rank):
        joined(rank, tmp_path, 1.0)
        dist.barrier()
        elsewhere = dist.FileStore(str(tmp_path / "elsewhere"), 2)
        if rank == 1:
            return leaves if leaves == "exits" else elsewhere.get("done")
        begun = time.monotonic()
        with pytest.raises(CommError) as told:
            one_exchange(lab, dist.group.WORLD)
        elsewhere.set("done", "yes")
        return told.value.lines, told.value.exit_code, time.monotonic() - begun

    (lines, code, seconds), _ = on_ranks(2, run, timeout=20, gloo=False)
    assert code != 0
    assert seconds < 5
    (line,) = lines
    assert "\n" not in line
    assert line.startswith(
        "rank 0 of 2: all_to_all_single 1, dispatch forward ranks counts, sending 32, 32 bytes to ranks 0 to 1 "
        "and receiving 32, 32, failed after "
    )


def test_a_rank_that_skips_the_backward_pass_is_missed_in_it(lab, tmp_path):
    def run(rank):
        joined(rank, tmp_path, 1.0)
        y = one_exchange(lab, dist.group.WORLD)
        if rank == 1:
            return None
        with pytest.raises(CommError) as told:
            y.sum().backward()
        return str(told.value)

    line, _ = on_ranks(2, run, timeout=20, gloo=False)
    assert line.startswith("rank 0 of 2: all_to_all_single 4, combine backward ranks, sending 32, 32 bytes")


def test_unhandled_it_ends_the_process_with_a_status(lab, tmp_path):
    def run(rank):
        joined(rank, tmp_path, 1.0)
        dist.barrier()
        if rank == 0:
            one_exchange(lab, dist.group.WORLD)

    with pytest.raises(RanksFailed, match=r"rank 0: CommError: rank 0 of 2: all_to_all_single 1, dispatch"):
        on_ranks(2, run, timeout=20, gloo=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_beside_is_computed_while_rows_are_on_their_way(lab, kind):
    def run(rank):
        begun, ended = transport.Transport.start, transport.Pending.wait
        events = []

        def start(self, rows, sent, received, hop, step, contents):
            events.append("counts leave" if "counts" in step.hop else f"{step.purpose} leaves")
            return begun(self, rows, sent, received, hop, step, contents)

        def wait(self):
            events.append("waits")
            return ended(self)

        transport.Transport.start, transport.Pending.wait = start, wait
        made = RemoteExchange(lab.configs[kind](4), lab.experts, dist.group.WORLD)
        routing = Routing(torch.tensor([[0, 7]]), torch.ones(1, 2))
        made.exchange(torch.ones(1, 4), routing, lambda rows, counts: rows, lambda: events.append("beside"))
        return events

    first = ["counts leave", "waits", "dispatch leaves", "beside", "waits"]
    assert [events[:5] for events in on_ranks(4, run)] == [first] * 4
