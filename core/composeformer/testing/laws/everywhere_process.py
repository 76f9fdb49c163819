"""A law of every part that is called with tensors: it does its work and leaves the process as it was.

What a process has once, all parts share: PyTorch's defaults and switches, generators of random numbers, the
environment.
"""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from composeformer.assemble import build
from composeformer.testing.calling import call, entering, uncalled
from composeformer.testing.case import Case
from composeformer.testing.law import EVERYWHERE, law


def shared() -> dict[str, Any]:
    """What the process has once."""
    numbers = np.random.get_state(legacy=False)
    return {
        "PyTorch's default dtype": torch.get_default_dtype(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "whether inference mode is on": torch.is_inference_mode_enabled(),
        "whether autocast is on": torch.is_autocast_enabled("cpu"),
        "the device of new tensors": torch.get_default_device(),
        "whether algorithms are deterministic": torch.are_deterministic_algorithms_enabled(),
        "the precision of float32 products": torch.get_float32_matmul_precision(),
        "the number of threads": torch.get_num_threads(),
        "PyTorch's generator": torch.get_rng_state(),
        "Python's generator": random.getstate(),
        "numpy's generator": repr(numbers),
        "the environment": dict(os.environ),
        "the working folder": Path.cwd(),
    }


@law(
    EVERYWHERE,
    "process",
    "to be built, and a forward, back or not, changes no default, switch or generator that others compute with",
    kills="forward-seeds-the-process",
    applies=uncalled,
    examples=3,
)
def process(case: Case) -> None:
    before = shared()
    x = entering(case)
    call(case, case.model, x)  # what is drawn and imported, is now
    before["the environment"] = dict(os.environ)

    def check(told: str) -> None:
        for name, value in shared().items():
            case.equal(value, before[name], f"{name} {told}")

    check("after the first forward")
    model = build(case.spec, seed=0)
    check("after it is built")
    case.gradients(model, lambda y: call(case, model, y), x)
    check("after a forward and back")
    model.eval()
    with torch.no_grad():
        within = shared()["whether gradients are recorded"]
        call(case, model, x)
        case.equal(torch.is_grad_enabled(), within, "whether gradients are recorded after a forward without")
    check("after a forward in evaluation")
