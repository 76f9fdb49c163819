"""Linear maps of the scaled policies: gradients, groups, dtypes, recomputation, the matrix they multiply by."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from composeformer.contracts import Linear
from composeformer_fp8.configs.mx import MXFP8
from composeformer_fp8.configs.scaled import FP8Block, FP8Tensor, Scaled
from composeformer_fp8.emulate import Emulated, Held
from composeformer_fp8.linear import Scaled as ScaledLinear
from composeformer_fp8.numbers import E4M3
from composeformer_fp8.policy import Quick, Reference
from composeformer_fp8.quantise import dequantise, quantise
from composeformer_fp8.testing import content, magnitude

CONFIGS: dict[str, Scaled] = {
    "block": FP8Block(),
    "block-ue8m0-e5m2": FP8Block(scales="ue8m0", gradients="e5m2"),
    "tensor": FP8Tensor(),
    "mx": MXFP8(),
}
POLICIES = {"reference": Reference, "fast": Quick}
# An output is rounded to bfloat16 once.
BF16 = 2.0**-8


def made(
    name: str,
    policy: str,
    inputs: int = 200,
    outputs: int = 130,
    groups: int | None = None,
    bias: bool = False,
    sensitive: bool = False,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A map with random values."""
    declared = Linear(
        name="map", inputs=inputs, outputs=outputs, groups=groups, bias=bias, sensitive=sensitive
    )
    weight = nn.Parameter(content("even", declared.weight.shape, 0))
    shift = nn.Parameter(content("even", (1, *declared.weights[1].shape), 1)[0]) if bias else None
    return POLICIES[policy](CONFIGS[name]).linear("map", declared, weight, shift, dtype=dtype)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_float64_within_the_declared_bound(name: str, policy: str) -> None:
    recipe = CONFIGS[name].recipe
    linear = made(name, policy)
    x = content("even", (300, 200), 2).bfloat16().requires_grad_()
    weight = linear.weight.detach()
    y = linear(x)
    gradient = content("wide", (300, 130), 3).bfloat16()
    y.backward(gradient)
    row, column = ((1, recipe.tile), (1, recipe.tile)) if recipe.tile else ((0, 0), (0, 0))
    turned = recipe.block if recipe.anew else recipe.block[::-1]
    x64, g64, w64 = x.detach().double(), gradient.double(), weight.double()
    cases = [
        (y, x64 @ w64.mT, (x64, row, recipe.activations), (w64, recipe.block), 200, False, BF16),
        (x.grad, g64 @ w64, (g64, row, recipe.gradients), (w64.mT, turned), 130, True, BF16),
        (weight_gradient(linear), g64.mT @ x64, (g64.mT, column, recipe.gradients), (x64.mT, column), 300, True, 0.0),
    ]
    for found, exact, (a, a_block, form), (b, b_block), length, backward, rounding in cases:
        mass = magnitude(a, a_block, form, recipe) @ magnitude(b, b_block, E4M3, recipe).mT
        bound = recipe.error_bound(length, backward) + recipe.fast_error(length)
        assert found is not None
        assert ((found.double() - exact).abs() <= (bound + rounding * (1 + bound)) * mass).all()
        # Rounding's errors are of either sign and add up like the terms themselves: some 4%, 6% with E5M2.
        assert (found.double() - exact).norm() < 1.5 * recipe.typical_error(backward) * exact.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ends", [None, [40, 40, 110]])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_map_rounds_nothing_but_operands_and_its_output_once(
    name: str, policy: str, ends: list[int] | None, bias: bool
) -> None:
    """Inputs in fp32 are kept for the backward pass as they came, and a bias is added before the output is rounded."""
    linear = made(name, policy, groups=None if ends is None else len(ends), bias=bias)
    products, weight = linear.products, linear.weight.detach()
    x = content("even", (120, 200), 2).requires_grad_()
    gradient = content("even", (120, 130), 3).bfloat16()
    y = linear(x) if ends is None else linear(x, torch.tensor(ends))
    y.backward(gradient)
    held = products.held(weight)
    expected = products.output(x.detach(), held, ends)
    if bias:
        rows = torch.tensor([120] if ends is None else ends)
        group_N = torch.searchsorted(rows, torch.arange(120), right=True)
        expected = expected + torch.cat([linear.bias.detach().view(-1, 130), torch.zeros(1, 130)])[group_N]
    assert torch.equal(y, expected.bfloat16())
    assert torch.equal(x.grad, products.to_input(gradient, held, ends))  # type: ignore[arg-type]
    assert torch.equal(weight_gradient(linear), products.to_weight(gradient, x.detach(), ends))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_that_a_process_sets_changes_a_product(name: str, policy: str) -> None:
    """Its default dtype, its default device, and autocast are of other operations."""
    found = []
    settings: tuple[AbstractContextManager[object], ...] = (
        nullcontext(),
        default_dtype(torch.float64),
        default_dtype(torch.float16),
        torch.device("meta"),
        torch.autocast("cpu", torch.bfloat16),
    )
    for setting in settings:
        linear = made(name, policy)
        x = content("even", (140, 200), 2).bfloat16().requires_grad_()
        gradient = torch.ones(140, 130, dtype=torch.bfloat16)
        with setting:
            y = linear(x)
            y.backward(gradient)
            found.append((y, linear.matrix(), x.grad, linear.weight.grad))
    for each in found[1:]:
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(each, found[0], strict=True))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def weight_gradient(linear: nn.Module) -> Tensor:
    found: Tensor = linear.weight.grad
    assert found.dtype == torch.float32
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_gives_the_very_gradients(name: str, policy: str) -> None:
    found = []
    for again in (False, True):
        linear = made(name, policy, groups=2)
        x = content("even", (40, 200), 6).requires_grad_()
        ends = torch.tensor([10, 35])
        y = checkpoint(linear, x, ends, use_reentrant=False) if again else linear(x, ends)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad, linear.weight.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Counted(Emulated):
    """The emulation, with a list of the products it was asked for."""

    def __init__(self, config: Scaled) -> None:
        super().__init__(config.recipe)
        self.asked: list[str] = []

    def to_input(self, gradient: Tensor, held: Held, ends: list[int] | None) -> Tensor:
        self.asked.append("input")
        return super().to_input(gradient, held, ends)

    def to_weight(self, gradient: Tensor, x: Tensor, ends: list[int] | None) -> Tensor:
        self.asked.append("weight")
        return super().to_weight(gradient, x, ends)


@pytest.mark.parametrize("wanted", [("input",), ("weight",), ("input", "weight")])
def test_only_gradients_that_are_needed_are_computed(wanted: tuple[str, ...]) -> None:
    products = Counted(CONFIGS["block"])
    weight = nn.Parameter(content("even", (8, 12), 0), requires_grad="weight" in wanted)
    linear = ScaledLinear(weight, None, products, torch.bfloat16)
    x = content("even", (5, 12), 1).requires_grad_("input" in wanted)
    linear(x).sum().backward()
    assert sorted(products.asked) == list(wanted)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("config", [FP8Block(), FP8Block(scales="ue8m0"), FP8Tensor()])
@pytest.mark.parametrize("groups", [None, 3])
def test_stored_codes_are_multiplied_as_they_are(policy: str, config: Scaled, groups: int | None) -> None:
    declared = Linear(name="map", inputs=200, outputs=150, groups=groups)
    # Scales that no encoder would give: requantising would lose them.
    codes, scales = quantise(content("even", declared.weight.shape, 0), (128, 128), E4M3, "float32")
    scales = scales * 1.37
    value = dequantise(codes, scales, (128, 128))
    buffers = nn.Buffer(codes), nn.Buffer(scales)
    linear = POLICIES[policy](config).linear(
        "map", declared, buffers[0], None, scales=buffers[1:], dtype=torch.float32
    )
    assert dict(linear.named_parameters()) == {}
    assert [name for name, _ in linear.named_buffers()] == ["weight", "weight_scale_inv"]
    assert torch.equal(linear.matrix(), value)
    x = torch.eye(200).repeat(groups or 1, 1).requires_grad_()
    ends = None if groups is None else torch.arange(1, groups + 1) * 200
    y = linear(x, ends)
    used = y.view(*value.shape[:-2], 200, 150).mT
    assert ((used - value).abs() <= 2.0**-22 * value.abs()).all()
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("groups", [None, 3])
def test_shapes_are_known_without_values(name: str, policy: str, groups: int | None) -> None:
    linear = made(name, policy, groups=groups, bias=True).to("meta")
    x = torch.empty(7, 200, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = linear(x, None if groups is None else torch.empty(groups, dtype=torch.int32, device="meta"))
    y.sum().backward()
    assert (y.shape, y.dtype) == ((7, 130), torch.bfloat16)
    assert x.grad is not None
    assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
    assert linear.weight.grad.shape == linear.weight.shape


def test_without_a_row_a_frozen_stack_is_still_a_function_of_its_input() -> None:
    linear = made("block", "fast", inputs=9, outputs=7, groups=3, sensitive=True)
    linear.requires_grad_(False)
    x = torch.zeros(0, 9, requires_grad=True)
    linear(x, torch.zeros(3, dtype=torch.int32)).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 9)
