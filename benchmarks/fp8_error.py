"""How far scaled products are from exact ones: by format and reduction, by promotion and accumulator; and their time.

Errors are root mean squares over that of the exact product, in float64 from the same operands. With outliers, one
activation in the tensor is so many times as large, and the error is the median of those of the rows. Times are of one
linear map on one thread, forward and backward, the least of several in processor time.

    python benchmarks/fp8_error.py          prints the figures and writes benchmarks/results/fp8_error.json
"""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from composeformer.contracts import Linear
from composeformer_dense.configs.precision import BF16
from composeformer_dense.precision import BF16Policy
from composeformer_fp8.configs.int8 import Int8, Rows
from composeformer_fp8.configs.mx import MXFP8
from composeformer_fp8.configs.recipe import Recipe
from composeformer_fp8.configs.scaled import FP8Block, FP8Tensor
from composeformer_fp8.emulate import Operand, product
from composeformer_fp8.int8 import Int8Policy, RowsCodec
from composeformer_fp8.numbers import E4M3
from composeformer_fp8.policy import Quick, Reference
from composeformer_fp8.quantise import quantise, values

RESULT = Path(__file__).parent / "results" / "fp8_error.json"
LENGTHS = (384, 1024, 4096)
OUTLIERS = (1e2, 1e3, 1e4, 1e5, 1e6)
SIDE = 128
POLICIES: dict[str, Any] = {
    "bf16": BF16Policy(BF16()),
    "fp8-block": Reference(FP8Block()),
    "fp8-block, ue8m0": Reference(FP8Block(scales="ue8m0")),
    "fp8-block, e5m2 gradients": Reference(FP8Block(gradients="e5m2")),
    "fp8-tensor": Reference(FP8Tensor()),
    "mxfp8": Reference(MXFP8()),
    "int8": Int8Policy(Int8()),
}


def made(policy: Any, weight: Tensor) -> nn.Module:
    """The policy's map with this weight."""
    declared = Linear(name="map", inputs=weight.shape[1], outputs=weight.shape[0])
    if isinstance(policy, Int8Policy):
        codes, scales = (nn.Buffer(part) for part in RowsCodec(Rows()).encode(weight))
        return policy.linear("map", declared, codes, None, scales=(scales,), dtype=torch.float32)
    linear: nn.Module = policy.linear("map", declared, nn.Parameter(weight.clone()), None, dtype=torch.float32)
    return linear


def relative(found: Tensor, exact: Tensor) -> float:
    return rounded(float((found.double() - exact).norm() / exact.norm()))


def rounded(number: float) -> float:
    return float(f"{number:.3g}")


def drawn(rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and output gradient; activations in bfloat16."""
    generator = torch.Generator().manual_seed(rows + outputs + inputs)
    x, gradient, weight = (
        torch.randn(shape, generator=generator) for shape in ((rows, inputs), (rows, outputs), (outputs, inputs))
    )
    return x.bfloat16(), weight * inputs**-0.5, gradient.bfloat16()


def errors(policy: Any, length: int) -> dict[str, float]:
    """Of the output over `length` inputs, the input gradient over as many outputs, the weight gradient over tokens."""
    x, weight, _ = drawn(SIDE, SIDE, length)
    with torch.no_grad():
        found = {"output": relative(made(policy, weight)(x), x.double() @ weight.double().mT)}
    if isinstance(policy, Int8Policy):
        return found
    x, weight, gradient = drawn(SIDE, length, SIDE)
    x.requires_grad_()
    made(policy, weight)(x).backward(gradient.float())
    found["to_input"] = relative(x.grad, gradient.double() @ weight.double())  # type: ignore[arg-type]
    x, weight, gradient = drawn(length, SIDE, SIDE)
    linear = made(policy, weight)
    linear(x).backward(gradient.float())
    found["to_weight"] = relative(linear.weight.grad, gradient.double().mT @ x.double())
    return found


def outlier(policy: Any, size: float) -> float:
    """The median error of rows beside one activation of this size, over 1024 inputs."""
    x, weight, _ = drawn(SIDE, SIDE, 1024)
    x[0, 0] = size
    exact = x.double() @ weight.double().mT
    with torch.no_grad():
        error = (made(policy, weight)(x).double() - exact).norm(dim=1) / exact.norm(dim=1)
    return rounded(float(error.median()))


def sums(length: int) -> dict[str, float]:
    """Of sums alone, against the exact sum of the same codes: largest error over the results' root mean square."""
    narrow = FP8Tensor(accumulator_bits=14, promotion=0).recipe
    return {
        "24 bits, promoted each 128": worst(FP8Tensor().recipe, length, torch.randn),
        "14 bits, promoted each 128": worst(FP8Tensor(accumulator_bits=14).recipe, length, torch.randn),
        "14 bits, never promoted": worst(narrow, length, torch.randn),
        "14 bits, never promoted, positive numbers": worst(narrow, length, torch.rand),
    }


def worst(recipe: Recipe, length: int, random: Callable[..., Tensor]) -> float:
    generator = torch.Generator().manual_seed(length)
    operands = [random(64, length, generator=generator) for _ in range(2)]
    a, b = (Operand(*quantise(each, (0, 0), E4M3, "float32"), (0, 0)) for each in operands)
    exact = values(a.codes, torch.float64) @ values(b.codes, torch.float64).mT * a.scales.double() * b.scales.double()
    error = (product(a, b, recipe).double() - exact).abs().max()
    return rounded(float(error / exact.square().mean().sqrt()))


def seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(7):
        started = process_time()
        run()
        times.append(process_time() - started)
    return min(times)


def times() -> dict[str, float]:
    """Milliseconds of a map of 2048 tokens from 384 features to 1024, forward and backward."""
    x = torch.randn(2048, 384).bfloat16().requires_grad_()
    gradient = torch.randn(2048, 1024).bfloat16()
    weight = torch.randn(1024, 384)
    policies = {
        "bf16": BF16Policy(BF16()),
        "fp8-block, fast": Quick(FP8Block()),
        "fp8-block, ue8m0, fast": Quick(FP8Block(scales="ue8m0")),
        "fp8-block, reference": Reference(FP8Block()),
    }
    found = {}
    for name, policy in policies.items():
        declared = Linear(name="map", inputs=384, outputs=1024)
        linear = policy.linear("map", declared, nn.Parameter(weight.clone()), None)
        found[name] = round(1000 * seconds(lambda linear=linear: linear(x).backward(gradient)), 2)  # type: ignore[misc]
    return found


def main() -> None:
    torch.set_num_threads(1)
    figures = {
        "errors": {name: {k: errors(policy, k) for k in LENGTHS} for name, policy in POLICIES.items()},
        "outliers": {name: {f"{a:.0e}": outlier(policy, a) for a in OUTLIERS} for name, policy in POLICIES.items()},
        "sums": {k: sums(k) for k in (512, 1024, 2048, 4096, 8192)},
        "milliseconds": times(),
        "machine": f"{platform.machine()}, 1 thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    text = json.dumps(figures, indent=2)
    RESULT.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
