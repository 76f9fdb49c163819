"""How far number formats move what they hold, without torch: what a policy, a codec, an exchange declare.

An operand v of a product comes out within

    relative |v| + max(shared A, least)        A the largest finite magnitude among those that share its scale

(zero as zero), and a sum of n products within `fixed` + n `each` of the sum of their magnitudes. The errors of results
follow (Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 and 3), and laws hold parts to them.

`Precision.rounding` derives all this from a format; a policy that rounds otherwise says so by a method of its own.
"""

import attrs

from composeformer.formats import BITS, Format

# Half the distance from 1 to the next number, the smallest number that has all its bits, and the largest.
FLOATS: dict[str, tuple[float, float, float]] = {
    "float64": (2.0**-53, 2.0**-1022, (2 - 2.0**-52) * 2.0**1023),
    "float32": (2.0**-24, 2.0**-126, (2 - 2.0**-23) * 2.0**127),
    "bfloat16": (2.0**-8, 2.0**-126, (2 - 2.0**-7) * 2.0**127),
    "float16": (2.0**-11, 2.0**-14, 65504.0),
    "float8_e4m3fn": (2.0**-4, 2.0**-6, 448.0),
    "float8_e5m2": (2.0**-3, 2.0**-14, 57344.0),
    "float8_e8m0fnu": (0.5, 2.0**-127, 2.0**127),
}
SMALLEST_SCALE = 2.0**-126


@attrs.frozen(kw_only=True)
class Operand:
    """How far one number may be moved. `block` is how many (rows, columns) share a scale, columns being those that a
    product sums over; 0 stands for all, of a stack of matrices those of one.
    """

    relative: float = 0.0
    shared: float = 0.0
    least: float = 0.0
    block: tuple[int, int] = (1, 1)

    @property
    def turned(self) -> "Operand":
        """That of the transposed matrix."""
        return attrs.evolve(self, block=self.block[::-1])


@attrs.frozen(kw_only=True)
class Rounding:
    """What the three products of a linear map round.

    `weight` is the weight as the output has it (outputs, inputs), `turned` as the gradient of the inputs has it
    (inputs, outputs); activations and gradients are rows along whatever is summed over. `result` is the roundoff of a
    product before it is given in its own dtype.
    """

    weight: Operand
    turned: Operand
    activation: Operand
    gradient: Operand
    result: float
    each: float = 2.0**-23
    fixed: float = 2.0**-21

    def sums(self, terms: int) -> float:
        """The largest relative error of a sum of so many products, in units of the sum of their magnitudes."""
        return self.fixed + terms * self.each


@attrs.frozen(kw_only=True)
class Carried:
    """What the wire of an exchange rounds: rows and gradients of results going out, results and gradients of rows
    coming back, once for each of `hops`.
    """

    dispatch: Operand = Operand()
    combine: Operand = Operand()
    hops: int = 1


def cast(dtype: str) -> Operand:
    """Rounding to a dtype, without a scale."""
    unit, normal, _ = FLOATS[dtype]
    return Operand(relative=unit, least=unit * normal)


def scaled(dtype: str, block: tuple[int, int], excess: float = 1.0) -> Operand:
    """Codes of a narrow float under scales in fp32: the nearest to v / s, a block's largest having the largest code.

    `excess` is by how much scales may be larger, 2 for powers of two. Below the normals codes stand evenly.
    """
    unit, normal, largest = FLOATS[dtype]
    unit += 2.0**-23
    shared = excess * unit * normal / largest
    return Operand(relative=unit, shared=shared, least=unit * normal * SMALLEST_SCALE, block=block)


def integers(bits: int, block: tuple[int, int], scale: str = "float32") -> Operand:
    """Whole numbers of `bits` bits, as many below zero as above, under scales of a dtype: half a step, which is the
    block's largest over the largest integer. One bit, or a sign, moves a number by no more than that largest.
    """
    half = 1 / (2**bits - 2) if bits > 1 else 1.0
    return Operand(shared=half * (1 + FLOATS[scale][0]) + 2.0**-22, least=SMALLEST_SCALE, block=block)


def of_format(form: Format) -> Rounding:
    """What a format says of itself. An element of fewer bits than what it is computed in is taken for an integer;
    activations and gradients are taken to be rounded to what is computed in, under one scale where that is narrow.
    """
    narrow = BITS[form.compute] < 16
    plain = scaled(form.compute, (0, 0), 2.0) if narrow else cast(form.compute)
    weight = plain
    if form.bits < BITS[form.compute]:
        codes = integers(form.bits, form.block or (0, 0), form.scale or "float32")
        weight = attrs.evolve(codes, relative=plain.relative)
    elif form.block is not None and narrow:
        weight = attrs.evolve(plain, block=form.block)
    wide = form.compute == "float64"
    return Rounding(
        weight=weight,
        turned=weight.turned,
        activation=plain,
        gradient=plain,
        result=FLOATS["float32" if narrow else form.compute][0],
        each=2.0**-52 if wide else 2.0**-23,
        fixed=2.0**-50 if wide else 2.0**-21,
    )
