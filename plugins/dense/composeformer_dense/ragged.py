"""A stack of linear maps, each over its own rows: y_i = x_i W_e^T for the rows i of group e.

Where it serves this is PyTorch's `grouped_mm`, which reads no count on the host. It leaves rows past the last
group as it found the memory, in the output and in the gradient, so both are blanked here, and on a GPU the
weight gradient of an empty group too (pytorch issues 154557 and 172439). It takes dense gradients only, no
float64, one row at least, and rows of whole 16 bytes; elsewhere groups are multiplied one by one.

Shapes: N rows, I inputs, O outputs, E groups.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ragged(
    x: Float[Tensor, "N I"],
    matrix: Float[Tensor, "E O I"],
    bias: Float[Tensor, "E O"] | None,
    ends: Int[Tensor, " E"],
) -> Float[Tensor, "N O"]:
    """Each group's rows by its own map; `ends` are the groups' ends. Rows past the last come out as zeros."""
    if not fused(x, matrix) or not len(x):
        return _one_by_one(x, matrix, bias, ends)
    x, matrix = x.contiguous(), matrix.contiguous()
    offsets = ends.to(torch.int32)
    if torch.is_grad_enabled():
        y: Tensor = _Grouped.apply(x, matrix, offsets)  # type: ignore[no-untyped-call]
    else:
        y = _rows(x, matrix, offsets)
    if bias is None:
        return y
    group_N = torch.searchsorted(ends, torch.arange(len(x), device=ends.device), right=True)
    # The gradient adds up all rows of a group one by one, which in bfloat16 would end at 256.
    wide = F.pad(bias, (0, 0, 0, 1)).to(torch.promote_types(bias.dtype, torch.float32))
    return y + wide[group_N].to(bias.dtype)


def fused(x: Tensor, matrix: Tensor) -> bool:
    """Whether PyTorch has a grouped product for these, and for their gradients."""
    whole = 16 // x.element_size()
    if x.dtype not in DTYPES or matrix.shape[1] % whole or matrix.shape[2] % whole:
        return False
    if x.is_cuda:
        return torch.version.hip is not None or torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.is_cpu or x.is_meta


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrix, ends)
        return _rows(x, matrix, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, matrix, ends = ctx.saved_tensors
        gradient = _counted(gradient, ends)
        to_x = _rows(gradient, matrix.mT, ends) if ctx.needs_input_grad[0] else None
        to_matrix = _groups(gradient, x, ends) if ctx.needs_input_grad[1] else None
        return to_x, to_matrix, None


def _rows(x: Tensor, matrix: Tensor, ends: Tensor) -> Tensor:
    """Rows times their groups' transposed matrices."""
    if x.is_cpu and not torch.compiler.is_compiling():
        y = F.grouped_mm(x, matrix.mT, offs=ends)
        end = int(ends[-1])
        if end < len(y):
            y[end:] = 0
        return y
    beyond_N = torch.arange(len(x), device=x.device) >= ends[-1]
    return _product(x, matrix.mT, ends).masked_fill_(beyond_N[:, None], 0)


def _groups(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Each group's product of gradients and inputs."""
    found = _product(gradient.mT, x, ends)
    if found.is_cpu:
        return found
    empty_E = ends.diff(prepend=ends.new_zeros(1)) == 0
    return found.masked_fill_(empty_E[:, None, None], 0)


def _product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or a.is_meta:
        found: Tensor = _opaque(a, b, ends)
        return found
    return F.grouped_mm(a, b, offs=ends)


@torch.library.custom_op("composeformer_dense::grouped_mm", mutates_args=())
def _opaque(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The same with a shape function that takes every dtype; PyTorch's own takes bfloat16 alone."""
    return F.grouped_mm(a, b, offs=ends)


@_opaque.register_fake
def _shape(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])


def _one_by_one(x: Tensor, matrix: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    stops = [0, *ends.tolist()]
    biases = [None] * len(matrix) if bias is None else bias.unbind(0)
    groups = zip(stops[:-1], stops[1:], matrix.unbind(0), biases, strict=True)
    x = x.contiguous()
    parts = [F.linear(x[start:stop], weight, shift) for start, stop, weight, shift in groups]
    y = torch.cat([*parts, x.new_zeros(len(x) - stops[-1], matrix.shape[1])])
    if not y.is_cpu or torch.compiler.is_compiling() or stops[-1] == len(y):
        return y
    # As below, by an operation that can be differentiated twice, forward and in a function: of these rows no gradient.
    return y.masked_fill(torch.arange(len(y))[:, None] >= stops[-1], 0)


def _counted(gradient: Tensor, ends: Tensor) -> Tensor:
    """A gradient row by row in memory, on a CPU with zeros past the last group.

    There a product of bfloat16 reads on past the numbers that it multiplies, and multiplies those by zero: NaN in rows
    that do not count, or in a column's neighbour, would spoil the weight's gradient (PyTorch 2.13, with AMX).
    """
    gradient = gradient.contiguous()
    if not gradient.is_cpu or torch.compiler.is_compiling():
        return gradient
    end = int(ends[-1])
    if end == len(gradient):
        return gradient
    return torch.cat([gradient[:end], gradient.new_zeros(len(gradient) - end, gradient.shape[1])])
