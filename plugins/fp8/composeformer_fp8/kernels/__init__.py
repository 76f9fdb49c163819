"""Kernels for accelerators. Each is loaded only where an implementation that needs it was chosen."""

from importlib.util import find_spec

import torch

# Ada is the first whose casts know these formats.
CAPABILITY = (8, 9)


def lacks() -> str | None:
    """What the kernels need and this machine has not."""
    if find_spec("triton") is None:
        return "it needs Triton: pip install 'composeformer[triton]'"
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        needed, here = (".".join(map(str, each)) for each in (CAPABILITY, found))
        return f"it needs CUDA compute capability {needed}, and this device has {here}"
    return None
