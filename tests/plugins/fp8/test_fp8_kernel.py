"""The Triton quantiser in Triton's interpreter, against the emulation: scales and quotients bit for bit.

The interpreter casts to 8 bits by cutting off, unlike any device, and knows no NaN there: codes are compared where
there is nothing to round.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

from composeformer import lazy
from composeformer.contracts import Facts
from composeformer_fp8.configs.scaled import FP8Block, fast_needs, triton_needs
from composeformer_fp8.kernels import missing

INTERPRETED = """
import torch
from composeformer_fp8.kernels.quantise import quantise as kernel
from composeformer_fp8.numbers import E4M3, E5M2
from composeformer_fp8.quantise import dequantise, quantise
from composeformer_fp8.testing import content

compared = 0
for rule in ("float32", "ue8m0", "mx"):
    for form in (E4M3, E5M2):
        for block in ((1, 128), (128, 128), (1, 32)):
            for shape, sort in (((2, 18, 70), "wide"), ((1, 1), "even"), ((130, 129), "huge"), ((0, 4), "even")):
                if shape[0] == 130 and block != (128, 128):
                    continue
                x = content(sort, shape, 7)
                if x.numel() > 1:
                    x[..., 0, 0], x[..., 1, 1] = float("inf"), float("nan")
                    x[..., 2, :], x[..., 3, :], x[..., 4, :] = 0, x[..., 3, :] * 2.0**-140, 2.0**-137
                for source in (x, x.mT) if x.ndim == 3 else (x,):
                    codes, scales = quantise(source, block, form, rule)
                    ratios, found = kernel(source, block, form, rule, ratios=True)
                    assert torch.equal(found, scales), (rule, form, block, shape)
                    assert torch.equal(ratios.to(codes.dtype).view(torch.uint8), codes.view(torch.uint8))
                    plain = dequantise(codes, scales, block).nan_to_num(0.0)
                    plain = plain.where(plain.abs() >= 2.0**-6 * scales.amax(), 0.0) if x.numel() else plain
                    again, rescaled = kernel(plain, block, form, rule)
                    exact, own = quantise(plain, block, form, rule)
                    whole = exact.float().abs() >= form.normal
                    assert torch.equal(rescaled, own)
                    assert torch.equal(again.float()[whole], exact.float()[whole])
                    compared += int(whole.sum())
print(compared)
"""


def test_kernel_equals_the_emulation_in_the_interpreter() -> None:
    if not lazy.available("triton"):  # as on systems that it does not run on
        assert "composeformer[triton]" in str(missing(False, (9, 0)))
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10_000


def facts(device: str, **fields: object) -> Facts:
    site = SimpleNamespace(path="precision")
    return Facts(config=FP8Block(**fields), site=site, phase="train", device=device, dtype="bfloat16")  # type: ignore[arg-type]


def test_kernel_gives_its_reason_where_it_can_not_serve() -> None:
    assert triton_needs(facts("cpu")) == "its kernel is for cuda devices, and this is cpu"


def test_kernel_needs_triton_and_a_device_whose_casts_know_eight_bits() -> None:
    assert missing(True, (8, 9)) is None
    assert missing(True, (10, 0)) is None
    assert missing(True, (8, 0)) == "it needs CUDA compute capability 8.9, and this device has 8.0"
    assert "composeformer[triton]" in str(missing(False, (9, 0)))


def test_other_accumulators_are_for_the_emulation_alone() -> None:
    assert fast_needs(facts("cpu")) is None
    for fields in ({"promotion": 0}, {"accumulator_bits": 14}):
        assert "only the reference" in str(fast_needs(facts("cpu", **fields)))
    assert fast_needs(facts("cpu", scales="ue8m0", gradients="e5m2")) is None
