"""`int8`: weights as integers with a scale per output, multiplied by bfloat16 activations; and the codec.

    w ~ q s        s = amax / 127 of the row, in bfloat16, at least 2^-126        q = w / s, to nearest, ties to even

A row whose codes are all zero has s = 1. For a few rows of activations PyTorch has a product on the CPU that reads the
integers themselves; for more, and for groups, they are dequantised.

Shapes: N rows, I inputs, O outputs, E groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from composeformer.contracts import Linear
from composeformer.errors import InputError
from composeformer.tensors import DTYPES
from composeformer_fp8.configs.int8 import LARGEST, Int8, Rows
from composeformer_fp8.kept import Kept
from composeformer_fp8.numbers import SMALLEST_SCALE
from composeformer_fp8.plain import High, ragged

# Up to so many rows the product of integers is the quicker one.
FEW = 8
# It reads its inputs in vectors of this length, and beyond their end where they are not whole; and it ends the process
# where memory does not begin at a multiple of a vector, as that of a mapped file need not (PyTorch 2.13).
VECTOR = 16
ALIGNED = 64


class RowsCodec:
    """Matrices to integers and scales, and back."""

    def __init__(self, config: Rows) -> None:
        self.config = config

    def encode(self, value: Float[Tensor, "*E O I"]) -> tuple[Int[Tensor, "*E O I"], Float[Tensor, "*E O 1"]]:
        """Codes and scales. Raises InputError for what integers can not hold."""
        value = value.float()
        if not value.isfinite().all():
            raise InputError("int8-row: a weight holds NaN or infinity, which integers can not")
        amax = value.abs().amax(-1, keepdim=True) if value.shape[-1] else value.new_zeros(*value.shape[:-1], 1)
        scales = (amax / LARGEST).clamp(min=SMALLEST_SCALE).bfloat16()
        scales = scales.masked_fill(amax <= scales.float() / 2, 1.0)
        codes = (value / scales.float()).round().clamp(-LARGEST, LARGEST)
        return codes.to(torch.int8), scales

    def decode(
        self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32, rows: slice | None = None
    ) -> Float[Tensor, "*E O I"]:
        """q s, which fp32 holds exactly; of some `rows` alone where these are given."""
        codes, scales = parts if rows is None else (part[..., rows, :] for part in parts)
        return (codes.float() * scales.float()).to(dtype)

    def wrong(self, place: int, part: Tensor) -> str | None:
        """What no encoder writes: scales that are not finite and positive, the code -128."""
        if place == 0:
            return "the code -128, which a symmetric form lacks" if bool((part == -128).any()) else None
        good = part.isfinite() & (part > 0)
        return None if bool(good.all()) else "a scale that is not finite and positive"


class IntegerLinear(Kept):
    """A linear map, or a stack of them, of integers and scales. It computes, and refuses gradients."""

    bias: nn.Parameter | None

    def __init__(
        self, role: str, weight: Tensor, scales: Tensor, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.role = role
        self.weight = weight
        self.weight_scale = scales
        self.register_parameter("bias", bias)
        self.dtype = dtype

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape[-2:]
        groups = f"groups={self.weight.shape[0]}, " if self.weight.ndim == 3 else ""
        return f"{groups}{inputs} -> {outputs}, bias={self.bias is not None}"

    def matrix(self) -> Float[Tensor, "*E O I"]:
        """The weight in fp32, exactly."""
        return self.weight.float() * self.weight_scale.float()

    def forward(
        self, x: Float[Tensor, "*N I"], offsets: Int[Tensor, " E"] | None = None
    ) -> Float[Tensor, "*N O"]:
        """x W^T + b; with `offsets`, the ends of the groups' rows, each group's rows by its own map."""
        y: Tensor = _Inference.apply(x, self, offsets)  # type: ignore[no-untyped-call]
        return y

    def product(self, x: Tensor, offsets: Tensor | None) -> Tensor:
        """`forward` without gradients."""
        x = x.bfloat16()
        bias = None if self.bias is None else self.bias.float()
        if offsets is not None:
            return ragged(x.float(), self.weight, bias, offsets, self.weight_scale).to(self.dtype)
        if bias is None and self.dtype == torch.bfloat16 and packed(x, self.weight):
            rows = aligned(x.reshape(-1, x.shape[-1]).contiguous())
            self.weight = aligned(self.weight)
            y = torch._weight_int8pack_mm(rows, self.weight, self.weight_scale[:, 0])
            return y.view(*x.shape[:-1], y.shape[-1])
        y = x.float() @ self.weight.float().mT * self.weight_scale[:, 0].float()
        return (y if bias is None else y + bias).to(self.dtype)


def packed(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's product of integers serves, and is the quicker one."""
    whole = x.shape[-1] % VECTOR == 0 and weight.is_contiguous()
    few = 0 < x.shape[:-1].numel() <= FEW
    return x.is_cpu and whole and few and not torch.compiler.is_compiling()


def aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy where its memory begins anywhere; one that may be kept, also in inference mode."""
    if x.data_ptr() % ALIGNED == 0:
        return x
    with torch.inference_mode(False):
        return x.clone()


class _Inference(torch.autograd.Function):
    """A map whose gradient nobody may ask for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: IntegerLinear, offsets: Tensor | None) -> Tensor:
        ctx.role = linear.role
        return linear.product(x, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise InputError(
            f"{ctx.role}: precision int8 is for inference, its weights do not train; train with full, bf16 or fp8-block"
        )


class Int8Policy:
    """Linear maps of integers but the sensitive ones, which take and give fp32."""

    def __init__(self, config: Int8) -> None:
        self.config = config
        self.activations = DTYPES[config.activations]

    def linear(
        self,
        role: str,
        declared: Linear,
        weight: Tensor,
        bias: nn.Parameter | None,
        *,
        scales: Sequence[Tensor] = (),
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The map in fp32 where it is stored plainly, of integers elsewhere."""
        if not scales:
            return High(weight, bias, dtype or torch.float32)
        return IntegerLinear(role, weight, scales[0], bias, dtype or self.activations)
