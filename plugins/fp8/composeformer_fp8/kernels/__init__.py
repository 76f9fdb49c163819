"""Kernels for accelerators. Each is loaded only where an implementation that needs it was chosen."""

import torch

from composeformer import lazy

# Ada is the first whose casts know these formats.
CAPABILITY = (8, 9)


def lacks() -> str | None:
    """What the kernels need and this machine, which has a CUDA device, has not."""
    return missing(lazy.available("triton"), torch.cuda.get_device_capability())


def missing(triton: bool, capability: tuple[int, int]) -> str | None:
    """The same of a machine with such a device, and with or without Triton."""
    if not triton:
        return "it needs Triton: pip install 'composeformer[triton]'"
    if capability < CAPABILITY:
        needed, here = (".".join(map(str, each)) for each in (CAPABILITY, capability))
        return f"it needs CUDA compute capability {needed}, and this device has {here}"
    return None
