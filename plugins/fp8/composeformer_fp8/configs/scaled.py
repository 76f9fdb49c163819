"""`fp8-block` and `fp8-tensor`: linear maps whose three products multiply 8-bit floats, on paper.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.3: E4M3 for all tensors, 1x128 tiles and 128x128 blocks, scales
online, accumulation promoted to fp32 each 128 of the reduction, embedding, head, routers, norms and attention in
higher precision, moments in bfloat16, master weights and gradients in fp32. `fp8-tensor` is the recipe that it
improves on: one scale for a tensor.
"""

import attrs

from composeformer import lazy
from composeformer.config import config, field
from composeformer.contracts import Facts, Weight
from composeformer.formats import Format, plain
from composeformer.precision import Precision
from composeformer.rounding import Rounding, of_format
from composeformer_fp8.configs.recipe import Recipe
from composeformer_fp8.numbers import FORMS

CODEC = "f8-128x128"


@config
class Scaled(Precision):
    """What policies share that train through scaled products."""

    moments: str = field(
        default="bfloat16",
        choices=("bfloat16", "float32"),
        affects="execution",
        help="The optimizer's averages of every tensor.",
    )

    @property
    def activations(self) -> str:
        return "bfloat16"

    @property
    def recipe(self) -> Recipe:
        """How products are quantised and accumulated."""
        raise TypeError(f"{type(self).__name__} states no recipe")

    @property
    def storage(self) -> str:
        """How the weights of linear maps are stored."""
        return "float32"

    def error_bound(self, inputs: int, gradient: bool = False) -> float:
        """The largest error of one element of a product over `inputs`, before its rounding to bfloat16, in units of
        sum_k (|a_k| + f A_k) (|b_k| + f B_k): `Recipe.error_bound`, `Recipe.floor`.
        """
        return self.recipe.error_bound(inputs, gradient)

    def rounding(self, role: str, weight: Weight, sensitive: bool) -> Rounding:
        """That of the recipe; sensitive maps are computed in fp32, whatever they are stored in."""
        if sensitive:
            return of_format(plain("float32", "sensitive"))
        return (self.recipe.of_stored() if self.storage == "float8_e4m3fn" else self.recipe).rounding

    def format(self, role: str, weight: Weight, sensitive: bool) -> Format:
        if weight.dtype is not None:
            return plain(weight.dtype, "fixed by its part")
        released = self.storage == "float8_e4m3fn"
        if sensitive or weight.name.endswith(".bias"):
            why = "sensitive" if sensitive else "a bias"
            return self._updated(plain("bfloat16" if released else "float32", why))
        recipe = self.recipe.of_stored() if released else self.recipe
        found = Format(
            storage=self.storage,
            compute=recipe.weights.dtype,
            bits=8,
            gather=self.storage,
            gradient="float32" if released else self.storage,
            moment=self.storage,
            block=recipe.block,
            scale="float8_e8m0fnu" if recipe.exact_scales else "float32",
            codec=CODEC if released else None,
            why="a linear map",
        )
        return self._updated(found)

    def _updated(self, form: Format) -> Format:
        return attrs.evolve(form, moment=self.moments)


@config
class FP8(Scaled):
    """The options of `fp8-block` and `fp8-tensor`."""

    weights: str = field(
        default="float32",
        choices=("float32", "bfloat16", "float8_e4m3fn"),
        affects="execution",
        help="How linear maps' weights are stored: masters, or the codes and scales of a released checkpoint, "
        "which do not train and beside which the rest is bfloat16.",
    )
    scales: str = field(
        default="float32",
        choices=("float32", "ue8m0"),
        affects="execution",
        help="Scales of any size, or powers of two.",
    )
    gradients: str = field(
        default="e4m3", choices=("e4m3", "e5m2"), affects="execution", help="The format of output gradients."
    )
    promotion: int = field(
        default=128,
        choices=(128, 0),
        affects="execution",
        unit="products",
        help="After how many products a partial sum is added to an fp32 accumulator; 0: never.",
    )
    accumulator_bits: int = field(
        default=24,
        choices=(24, 14),
        affects="execution",
        unit="bits",
        help="Significant bits of partial sums: 24 rounds once; 14 cuts each product and sum, as an H800 does.",
    )

    @property
    def storage(self) -> str:
        return self.weights

    def _recipe(self, tile: int, block: tuple[int, int]) -> Recipe:
        return Recipe(
            tile=tile,
            block=block,
            scales=self.scales,
            gradients=FORMS[self.gradients],
            promoted=self.promotion != 0,
            bits=self.accumulator_bits,
        )


@config
class FP8Block(FP8):
    """Tiles of 1x128 and blocks of 128x128 share a scale."""

    @property
    def recipe(self) -> Recipe:
        return self._recipe(128, (128, 128))


@config
class FP8Tensor(FP8):
    """A tensor shares one scale; of groups, each its own."""

    @property
    def recipe(self) -> Recipe:
        return self._recipe(0, (0, 0))


def fast_needs(facts: Facts) -> str | None:
    """Why the dequantised products can not serve, if they can not."""
    if not facts.config.recipe.declared:
        return "only the reference computes another promotion or accumulator"
    return None


def triton_needs(facts: Facts) -> str | None:
    """Why the Triton kernel can not serve, if it can not."""
    if facts.device != "cuda":
        return f"its kernel is for cuda devices, and this is {facts.device}"
    missing: str | None = lazy.load("composeformer_fp8.kernels:lacks")()
    return missing or fast_needs(facts)
