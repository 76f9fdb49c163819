"""A function on several gloo ranks, forked from this process: what is imported stays imported, so a start takes
some tens of milliseconds, and everything that the function closes over is there.

A rank that hangs is killed and fails the call, with where it stood. Threads do not survive a fork, so each rank
computes with one.
"""

import faulthandler
import io
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class RanksFailed(AssertionError):
    """Ranks that raised or did not end: a line for each, and their tracebacks."""


def on_ranks(
    number: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, gloo: bool = True
) -> list[Any]:
    """What `function(rank, *args)` returned on each of `number` ranks; tensors come back as values.

    The process group is there unless `gloo` is False. Raises RanksFailed where a rank raised, died or was not done
    after `timeout` seconds; then all are killed.
    """
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(number)]
        ranks: list[BaseProcess] = []
        for rank, (_, end) in enumerate(pipes):
            told = (rank, number, Path(folder), timeout, gloo, end, function, args)
            ranks.append(context.Process(target=_rank, args=told, name=f"rank {rank}", daemon=True))
        for process in ranks:
            process.start()
        for _, end in pipes:
            end.close()
        try:
            return _gathered([pipe for pipe, _ in pipes], ranks, Path(folder), timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _gathered(
    pipes: Sequence[Connection], ranks: Sequence[BaseProcess], folder: Path, timeout: float
) -> list[Any]:
    """The ranks' results in their order."""
    found: dict[int, Any] = {}
    failed: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(found) + len(failed) < len(ranks):
        left = [rank for rank in range(len(ranks)) if rank not in found and rank not in failed]
        # Once a rank has failed, others may wait for it in vain.
        patience = min(5.0 if failed else timeout, deadline - time.monotonic())
        if not wait([end for rank in left for end in (pipes[rank], ranks[rank].sentinel)], max(patience, 0)):
            failed |= {rank: _stuck(rank, folder, timeout) for rank in left}
            break
        for rank in left:
            # In this order: one that is dead now says no more than what is there already.
            dead = not ranks[rank].is_alive()
            try:
                if pipes[rank].poll():
                    done, value = pipes[rank].recv()
                    (found if done else failed)[rank] = value
                    continue
            except EOFError:
                # A dying process closes its end a moment before it counts as dead.
                ranks[rank].join(5.0)
                dead = True
            if dead:
                failed[rank] = f"rank {rank} died with exit code {ranks[rank].exitcode}"
    if failed:
        raise RanksFailed("\n".join(failed[rank] for rank in sorted(failed)))
    return [found[rank] for rank in range(len(ranks))]


def _stuck(rank: int, folder: Path, timeout: float) -> str:
    stack = (folder / f"stack-{rank}").read_text()
    return f"rank {rank} was not done after {timeout:g} s, or waited for one that failed\n{stack}"


def _rank(
    rank: int,
    number: int,
    folder: Path,
    timeout: float,
    gloo: bool,
    end: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    ForkingPickler.register(Tensor, _values)
    ForkingPickler.register(torch.nn.Parameter, _values)
    with open(folder / f"stack-{rank}", "w") as stack:
        faulthandler.dump_traceback_later(0.9 * timeout, file=stack)
        try:
            if gloo:
                meeting = f"file://{folder / 'store'}"
                dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=number)
                dist.barrier()
            end.send((True, function(rank, *args)))
            # One that leaves closes its connections, on which others may still be reading.
            end.poll(1.0)
        except BaseException as error:
            told = io.StringIO()
            traceback.print_exception(error, file=told)
            end.send((False, f"rank {rank}: {type(error).__name__}: {error}\n{told.getvalue()}"))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _values(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor by its values; PyTorch would send a handle to memory that ends with its process."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return _rebuilt, (flat.view(torch.uint8).numpy().tobytes(), tensor.dtype, tuple(tensor.shape))


def _rebuilt(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
