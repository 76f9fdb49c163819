"""`int8` on paper: weights as 8-bit integers for inference, activations in bfloat16; and their codec `int8-row`.

Source: Dettmers et al., arXiv 2208.07339 (a scale per row, symmetric), without its 8-bit activations.
"""

import attrs

from composeformer.config import Config, config
from composeformer.contracts import Weight
from composeformer.formats import Format, plain
from composeformer.precision import Precision
from composeformer.rounding import Operand, Rounding, integers, of_format

CODEC = "int8-row"
LARGEST = 127


@config
class Rows(Config):
    """Integers of -127 to 127 and one bfloat16 scale for each output."""

    def stored(self, weight: Weight) -> tuple[Weight, ...]:
        """Codes under the weight's own name, and `<name>_scale`, which multiplies them."""
        scale = Weight(
            name=f"{weight.name}_scale", shape=(*weight.shape[:-1], 1), dtype="bfloat16", trains=False
        )
        return attrs.evolve(weight, dtype="int8", trains=False, init=None), scale

    @property
    def rounding(self) -> Operand:
        """How far encoding moves a number."""
        return integers(8, (1, 0), "bfloat16")

    def cut(self, dim: int, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """What holds [start, stop) of dimension -2 or -1: a row's scale serves all its columns."""
        return (start, stop), (start, stop) if dim == -2 else (0, 1)


@config
class Int8(Precision):
    """Linear maps of 8-bit integers, which do not train; the rest is stored in bfloat16."""

    @property
    def activations(self) -> str:
        return "bfloat16"

    def error_bound(self, inputs: int, gradient: bool = False) -> float:
        """The largest error of one element of a product over `inputs`, before its rounding to bfloat16, in units of
        sum_k |a_k| W, W the largest magnitude of the weight's row.

        A code errs by half a scale, which is W / 127 but for its own rounding to bfloat16, where that is above 2^-126;
        activations are exact.
        """
        return 0.5 / LARGEST * (1 + 2.0**-8) + (inputs + 2) * 2.0**-24

    def rounding(self, role: str, weight: Weight, sensitive: bool) -> Rounding:
        """That of the integers; products are in fp32, as sensitive maps are."""
        if sensitive:
            return of_format(plain("float32", "sensitive"))
        return attrs.evolve(super().rounding(role, weight, sensitive), result=2.0**-24)

    def format(self, role: str, weight: Weight, sensitive: bool) -> Format:
        if weight.dtype is not None:
            return plain(weight.dtype, "fixed by its part")
        if sensitive or weight.name.endswith(".bias"):
            return plain("bfloat16", "sensitive" if sensitive else "a bias")
        return Format(
            storage="int8",
            compute="bfloat16",
            bits=8,
            gather="int8",
            gradient="float32",
            moment="float32",
            block=(1, 0),
            scale="bfloat16",
            codec=CODEC,
            why="int8 rows, for inference",
        )
