"""`mxfp8` on paper: 32 elements along the reduction share a power of two.

Source: OCP Microscaling Formats (MX) 1.0; Rouhani et al., arXiv 2310.10537.
"""

from composeformer.config import config, field
from composeformer_fp8.configs.recipe import Recipe
from composeformer_fp8.configs.scaled import Scaled
from composeformer_fp8.numbers import FORMS


@config
class MXFP8(Scaled):
    """Blocks of 1x32 of activations, gradients and weights; weights are quantised anew for the input gradient."""

    gradients: str = field(
        default="e4m3", choices=("e4m3", "e5m2"), affects="execution", help="The format of output gradients."
    )

    @property
    def recipe(self) -> Recipe:
        return Recipe(tile=32, block=(1, 32), scales="mx", gradients=FORMS[self.gradients], chunk=32)
