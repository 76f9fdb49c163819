"""What the narrow formats can hold, without torch.

E4M3 here is the variant without infinities (`fn`): its largest exponent holds values but for one code, NaN.
Source: Micikevicius et al., arXiv 2209.05433; the OCP 8-bit Floating Point Specification, revision 1.0.
"""

from math import frexp, log, sqrt

import attrs

# Scales are fp32 normals, so that a scale times a code keeps its precision.
SMALLEST_SCALE = 2.0**-126


@attrs.frozen(kw_only=True)
class Narrow:
    """A floating-point format of `mantissa` explicit bits.

    `largest` is the largest finite value and `normal` the smallest that has all its bits; below it numbers stand
    `step` apart.
    """

    dtype: str
    mantissa: int
    largest: float
    normal: float

    @property
    def step(self) -> float:
        """The smallest positive number, and the distance of those below `normal`."""
        return self.normal * 2.0**-self.mantissa

    @property
    def roundoff(self) -> float:
        """The largest relative error of rounding to nearest, of normal numbers."""
        return 2.0 ** -(self.mantissa + 1)

    @property
    def spread(self) -> float:
        """The root mean square of rounding's relative error, of normal numbers with logarithms spread evenly.

        Errors are even within half a step of 2^-mantissa, and a significand's mean inverse square is 3 / (8 ln 2).
        """
        return 2.0**-self.mantissa * sqrt(3 / (8 * log(2)) / 12)

    @property
    def halfway(self) -> float:
        """Where rounding to nearest would leave the format: half a step of the last binade above `largest`."""
        last = 2.0 ** (frexp(self.largest)[1] - 1)
        return self.largest + last * self.roundoff


E4M3 = Narrow(dtype="float8_e4m3fn", mantissa=3, largest=448.0, normal=2.0**-6)
E5M2 = Narrow(dtype="float8_e5m2", mantissa=2, largest=57344.0, normal=2.0**-14)
FORMS = {"e4m3": E4M3, "e5m2": E5M2}


def blocks(size: int, block: int) -> int:
    """How many blocks cover a dimension, the last perhaps in part; a block of 0 is the whole dimension."""
    return 1 if block == 0 else -(-size // block)
