"""`full` and `bf16`: precision policies without scales, on paper.

Source of the second: Micikevicius et al., arXiv 1710.03740 (masters in float32), with bfloat16 (Kalamkar et
al., arXiv 1905.12322), which needs no loss scaling.
"""

import attrs

from composeformer.config import config, field
from composeformer.contracts import Weight
from composeformer.formats import Format, plain
from composeformer.precision import Precision


@config
class Full(Precision):
    """Every tensor is stored and computed in one dtype, but those that fix their own."""

    dtype: str = field(
        default="float32",
        choices=("float32", "bfloat16", "float16", "float64"),
        affects="execution",
        help="The dtype of weights, activations, gradients and moments.",
    )

    @property
    def activations(self) -> str:
        return self.dtype

    def format(self, role: str, weight: Weight, sensitive: bool) -> Format:
        if weight.dtype is not None:
            return plain(weight.dtype, "fixed by its part")
        return plain(self.dtype, f"full in {self.dtype}")


@config
class BF16(Precision):
    """Linear maps multiply in bfloat16; sensitive maps and plain weights stay in float32."""

    weights: str = field(
        default="float32",
        choices=("float32", "bfloat16"),
        affects="execution",
        help="How linear maps' weights are stored: float32 masters, or bfloat16 itself.",
    )

    @property
    def activations(self) -> str:
        return "bfloat16"

    def format(self, role: str, weight: Weight, sensitive: bool) -> Format:
        if weight.dtype is not None:
            return plain(weight.dtype, "fixed by its part")
        if sensitive:
            return plain("float32", "sensitive")
        multiplied = attrs.evolve(plain("bfloat16", f"bf16 with {self.weights} weights"), moment="float32")
        # Shards travel as they are stored, and are cast where they are multiplied.
        return attrs.evolve(multiplied, storage=self.weights, gather=self.weights, gradient=self.weights)
