"""What one process holds of a tensor that is sharded. PyTorch's own class for that is imported where there is one."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a process's shard of a whole one."""
    return type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) and isinstance(tensor, _dtensor().DTensor)


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    found: Tensor = tensor.to_local() if is_shard(tensor) else tensor
    return found


def like(old: Any, value: Tensor, device: str | torch.device) -> Tensor:
    """`value`, whole, as the model holds `old`: its shard where that is one; in old's dtype, on `device`."""
    if not is_shard(old):
        return value.to(device=device, dtype=old.dtype)
    mesh, kinds = old.device_mesh, _dtensor()
    start, stop = span(len(value), mesh.size(), mesh.get_local_rank())
    # A copy, so that the whole tensor is not kept.
    part = value[start:stop].to(device=device, dtype=old.dtype, copy=True).contiguous()
    made: Tensor = kinds.DTensor.from_local(
        part, mesh, (kinds.Shard(0),), run_check=False, shape=old.shape, stride=old.stride()
    )
    return made


def span(rows: int, size: int, rank: int) -> tuple[int, int]:
    """The first row of a process's shard and the next after its last, as FSDP2 cuts."""
    each = -(-rows // size)
    return min(rank * each, rows), min((rank + 1) * each, rows)


@cache
def _dtensor() -> Any:
    import torch.distributed.tensor as found

    return found
