"""Initial values: each tensor, and each group of one, draws from (seed, name, group) alone.

So the same seed gives the same weights at any layout: a process that holds some layers, or some experts,
draws just those. Values are drawn in fp32 on the CPU and then cast.
"""

from hashlib import blake2b

import torch
from torch import Tensor

from composeformer.contracts import Constant, Normal, Weight


def initial(name: str, weight: Weight, seed: int, default_std: float) -> Tensor:
    """The initial value of a declared tensor, on the CPU: fp32, or its own dtype when that is no float.

    A tensor that states no `init` is normal with `default_std`; three dimensions are groups.
    """
    init = weight.init if weight.init is not None else Normal(default_std)
    if isinstance(init, Constant):
        dtype = {"int64": torch.int64, "bool": torch.bool}.get(weight.dtype or "", torch.float32)
        return torch.full(weight.shape, init.value, dtype=dtype)
    if len(weight.shape) == 3:
        groups = range(weight.shape[0])
        return torch.stack([_normal(weight.shape[1:], init.std, seed, name, group) for group in groups])
    return _normal(weight.shape, init.std, seed, name, None)


def _normal(shape: tuple[int, ...], std: float, seed: int, name: str, group: int | None) -> Tensor:
    key = f"{seed}/{name}" if group is None else f"{seed}/{name}/{group}"
    number = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
    # The default dtype is the process's; a seed must not depend on it.
    return torch.empty(shape, dtype=torch.float32).normal_(
        0.0, std, generator=torch.Generator().manual_seed(number)
    )
