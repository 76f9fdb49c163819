"""The processes of a run: they meet in PyTorch's process group, and are counted in expert groups.

Rank r of W is rank r mod E of expert group r / E: the ranks of a group are neighbours, so that they share a node
where they can. Ranks of equal place in their groups hold the same experts.
"""

import atexit
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor
from torch import distributed as dist

from composeformer.errors import InputError, one_of, show
from composeformer.exchange import CommError
from composeformer.parallel.words import Words, gathered, shared_words, told_by_first

log = logging.getLogger(__name__)

# What PyTorch's `env://` reads; torchrun sets them all.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@attrs.frozen(kw_only=True, eq=False)
class World:
    """All processes as one of them sees them: `rank` of `size`, in expert groups of `experts`."""

    rank: int = 0
    size: int = 1
    experts: int = 1
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))

    @property
    def expert_rank(self) -> int:
        """The place in the own expert group."""
        return self.rank % self.experts

    @property
    def outer_rank(self) -> int:
        """The number of the own expert group."""
        return self.rank // self.experts

    @property
    def copies(self) -> int:
        """How many expert groups there are, which is how many processes hold each expert."""
        return self.size // self.experts

    @cached_property
    def mesh(self) -> Any:
        """All processes in one dimension, as FSDP2 wants them."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("data",))

    @cached_property
    def grid(self) -> Any:
        """The expert groups, one a row."""
        from torch.distributed.device_mesh import init_device_mesh

        names = ("data_outer", "expert")
        return init_device_mesh(self.device.type, (self.copies, self.experts), mesh_dim_names=names)

    @property
    def expert_group(self) -> "dist.ProcessGroup | None":
        """The processes that share the experts with this one; None where it has them all."""
        if self.experts == 1:
            return None
        return dist.group.WORLD if self.copies == 1 else self._group("expert")

    @property
    def outer_group(self) -> "dist.ProcessGroup | None":
        """The processes that hold the same experts as this one; None where there is no other."""
        if self.copies == 1:
            return None
        return dist.group.WORLD if self.experts == 1 else self._group("data_outer")

    def _group(self, name: str) -> "dist.ProcessGroup":
        found: dist.ProcessGroup = self.grid.get_group(name)
        return found

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each; in place."""
        if self.size > 1:
            with self.meets(f"the sum of {values.dtype} {tuple(values.shape)}"):
                dist.all_reduce(values)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The element-wise maximum over all processes; in place."""
        if self.size > 1:
            with self.meets(f"the maximum of {values.dtype} {tuple(values.shape)}"):
                dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def sum_copies(self, values: Tensor) -> Tensor:
        """The sum over the processes that hold the same experts; in place."""
        if self.copies > 1:
            with self.meets(f"the sum, over expert groups, of {values.dtype} {tuple(values.shape)}"):
                dist.all_reduce(values, group=self.outer_group)
        return values

    def agree(self, words: Mapping[str, str], what: str) -> None:
        """Raises InputError in every process where they differ in any of `words`, naming the first that does.

        Every process calls it. `what` is what they were about to do.
        """
        if self.size > 1:
            with self.meets(f"comparing {one_of(words)}"):
                shared_words(Words(words), what, self.rank, self.size, self.device)

    def every(self, text: str) -> Sequence[str]:
        """Every process's text, in their order."""
        if self.size == 1:
            return [text]
        with self.meets("telling each other"):
            return gathered(text, self.size, self.device)

    def first(self, text: str | None) -> str:
        """The text that the first process gives, in every process."""
        if self.size == 1:
            return str(text)
        with self.meets("being told by process 0"):
            return told_by_first(text, self.rank, self.device)

    @contextmanager
    def meets(self, where: str) -> Iterator[None]:
        """Raises CommError, with who waited and `where`, in place of what a collective inside raises."""
        begun = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise CommError.of(f"process {self.rank} of {self.size}: {where}", begun, error) from error


ALONE = World()
# The kind of device that this module let the processes meet for.
_started: str | None = None
_worlds: dict[tuple[int, str], tuple[object, World]] = {}


def start(device: str = "cpu") -> None:
    """Lets the processes that torchrun started meet, over gloo for the cpu and NCCL for cuda; once.

    Nothing where there is one process, or where they have met. Raises InputError for a backend that this PyTorch
    lacks, a device for which the program did not let them meet, or a launcher that does not say where to meet;
    CommError where not all come.
    """
    global _started
    kind = torch.device(device).type
    kind = "cpu" if kind == "meta" else kind
    if dist.is_available() and dist.is_initialized():
        if _started == "cpu" and kind != "cpu":
            told = "processes have met over gloo for the cpu; composeformer.parallel.stop() parts them"
            raise InputError(f"device = {device}: {told}")
        if _started is None and kind not in (there := _kinds()):
            told = f"the program let processes meet for {one_of(there)} alone, by init_process_group"
            raise InputError(f"device = {device}: {told}")
        return
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return
    size = _checked()
    backend = BACKENDS.get(kind)
    if backend is None:
        raise InputError(f"device = {device}: no way for processes to meet; there are {one_of(BACKENDS)}")
    if not dist.is_available() or not dist.is_backend_available(backend):
        told = f"processes on {kind} meet over {backend}, which this build of PyTorch lacks"
        raise InputError(f"device = {device}: {told}")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # What is no model's tensor travels on the cpu.
        backend = f"cpu:{BACKENDS['cpu']},cuda:{backend}"
    begun = time.monotonic()
    try:
        dist.init_process_group(backend)
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        told = f"process {os.environ['RANK']} of {size}: meeting at {place} over {backend}"
        raise CommError.of(told, begun, error) from error
    _started = kind
    atexit.register(stop)


def _checked() -> int:
    """The number of processes, where the environment says all that they need to meet."""
    found = {name: os.environ.get(name) or "" for name in VARIABLES}
    if missing := [name for name, value in found.items() if not value]:
        told = f"WORLD_SIZE = {found['WORLD_SIZE']}, but there is no {one_of(missing)}"
        raise InputError(f"{told}: processes are started by torchrun, or must say where they meet")
    for name, least, beyond in (("WORLD_SIZE", 1, None), ("RANK", 0, "WORLD_SIZE"), ("MASTER_PORT", 0, None)):
        value, limit = found[name], None if beyond is None else int(found[beyond])
        if not value.isdecimal() or int(value) < least or (limit is not None and int(value) >= limit):
            below = "" if limit is None else f" and < {beyond} ({limit})"
            raise InputError(f"{name} = {show(value)}: must be an integer >= {least}{below}, as torchrun sets it")
    return int(found["WORLD_SIZE"])


def _kinds() -> list[str]:
    """The kinds of devices for which processes have met."""
    pairs = dist.get_backend_config().split(",")
    return [pair.partition(":")[0] for pair in pairs]


def stop() -> None:
    """Ends what `start` began; nothing where the program itself let the processes meet."""
    global _started
    if _started is not None and dist.is_initialized():
        dist.destroy_process_group()
    _started = None
    _worlds.clear()


def world(experts: int, device: str) -> World:
    """The processes that met, in groups of `experts`, which divides their number; groups are made once."""
    kind = torch.device(device).type
    kind = "cpu" if kind == "meta" else kind
    meeting = dist.group.WORLD
    held = _worlds.get((experts, kind))
    if held is None or held[0] is not meeting:
        index = torch.cuda.current_device() if kind == "cuda" else None
        made = World(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            experts=experts,
            device=torch.device(kind) if index is None else torch.device(kind, index),
        )
        held = _worlds[experts, kind] = meeting, made
    return held[1]


def size() -> int:
    """How many processes met; 1 where none did."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
