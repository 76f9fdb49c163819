"""Forked ranks: what they return comes back, and whatever stops one is told, with its number."""

import os
import threading
import time
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from composeformer.testing.ranks import RanksFailed, on_ranks


class Found(NamedTuple):
    name: str
    values: dict[str, Tensor]


def test_tensors_of_any_dtype_come_back_with_their_bits() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    sent = {str(dtype): torch.tensor([[0.0, 1.0, 1.5]]).to(dtype) for dtype in dtypes}
    sent |= {
        "empty": torch.empty(0, 2),
        "scalar": torch.tensor(3.0),
        "strided": torch.arange(6).view(2, 3).mT,
    }
    for rank, found in enumerate(on_ranks(2, lambda rank, name: Found(f"{name} {rank}", sent), "rank")):
        assert found.name == f"rank {rank}"
        for name, tensor in sent.items():
            got = found.values[name]
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            raw = (t.contiguous().view(-1).view(torch.uint8) for t in (got, tensor))
            assert torch.equal(*raw)


def test_ranks_meet() -> None:
    def run(rank: int) -> int:
        total = torch.tensor([rank])
        dist.all_reduce(total)
        return int(total)

    assert on_ranks(3, run) == [3, 3, 3]


def test_a_rank_that_raises_is_told_with_its_traceback() -> None:
    def run(rank: int) -> None:
        if rank == 1:
            raise ValueError("no tokens")

    with pytest.raises(RanksFailed, match=r"(?s)rank 1: ValueError: no tokens\n.*in run"):
        on_ranks(2, run)


def test_a_rank_that_dies_is_told_with_its_exit_code() -> None:
    def run(rank: int) -> None:
        if rank == 1:
            os._exit(7)

    with pytest.raises(RanksFailed, match=r"rank 1 died with exit code 7"):
        on_ranks(2, run)


def test_a_rank_that_hangs_fails_the_call_and_shows_where_it_stood() -> None:
    def run(rank: int) -> None:
        if rank == 0:
            threading.Event().wait()

    started = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)rank 0 was not done after 2 s.*in run"):
        on_ranks(2, run, timeout=2.0)
    assert time.monotonic() - started < 20


def test_a_rank_whose_end_closes_before_it_is_dead_is_told_with_its_exit_code() -> None:
    def run(rank: int) -> None:
        # As a process does that dies: files first.
        os.closerange(3, 256)
        threading.Event().wait(0.2)
        os._exit(9)

    with pytest.raises(RanksFailed, match=r"rank 0 died with exit code 9"):
        on_ranks(1, run, gloo=False)
