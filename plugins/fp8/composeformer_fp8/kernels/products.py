"""`triton`: the products of dequantised operands, quantised by the kernel."""

import torch
from jaxtyping import Float
from torch import Tensor

from composeformer_fp8.fast import Fast
from composeformer_fp8.kernels.quantise import quantise
from composeformer_fp8.numbers import Narrow
from composeformer_fp8.policy import Quick
from composeformer_fp8.quantise import Block, dequantise


class Quantised(Fast):
    """`Fast`, with the kernel's codes; a tensor with one scale has PyTorch's."""

    def _rounded(self, x: Float[Tensor, "R C"], block: Block, form: Narrow) -> Float[Tensor, "R C"]:
        if 0 in block or x.dtype == torch.float64:
            return super()._rounded(x, block, form)
        if block[1] == 1:  # tiles of one column are tiles of one row of the transpose
            return self._rounded(x.mT, block[::-1], form).mT
        return dequantise(*quantise(x, block, form, self.recipe.scales), block)


class Kernels(Quick):
    """The policy whose maps quantise by the kernel."""

    products = Quantised
