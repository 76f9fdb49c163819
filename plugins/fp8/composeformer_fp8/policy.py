"""The scaled policies as a model has them: each non-sensitive linear map through three scaled products."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from composeformer.contracts import Linear
from composeformer.tensors import DTYPES
from composeformer_fp8.configs.scaled import Scaled as Config
from composeformer_fp8.emulate import Emulated
from composeformer_fp8.fast import Fast
from composeformer_fp8.linear import Coded, Scaled
from composeformer_fp8.plain import High


class Reference:
    """`reference`: products emulated as declared."""

    products: type[Emulated] = Emulated

    def __init__(self, config: Config) -> None:
        self.config = config
        self.activations = DTYPES[config.activations]
        self._products = self.products(config.recipe)
        self._of_stored = self.products(config.recipe.of_stored())

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
        """The map in fp32 where it is sensitive, through scaled products elsewhere."""
        if declared.sensitive:
            return High(weight, bias, dtype or torch.float32)
        given = dtype or self.activations
        if scales:
            return Coded(weight, scales[0], bias, self._of_stored, given)
        return Scaled(weight, bias, self._products, given)


class Quick(Reference):
    """`fast`: products of dequantised operands."""

    products = Fast
