"""How a map's three products are quantised and accumulated, without torch.

    y = x W^T  (along the inputs)      dx = dy W  (along the outputs)      dW = dy^T x  (along the tokens)

Each operand is cut into blocks that share a scale s; an element is a code q of a narrow format, and stands for
q s. Activations and output gradients are cut into tiles along the reduction of the product at hand.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.
"""

from math import ceil, hypot

import attrs

from composeformer.rounding import Operand, Rounding
from composeformer_fp8.numbers import E4M3, SMALLEST_SCALE, Narrow


@attrs.frozen(kw_only=True)
class Recipe:
    """The numbers of a scaled policy.

    `tile` is how many elements along the reduction share a scale in activations and output gradients, `block` how
    many (outputs, inputs) of a weight; 0 stands for all. A `block` of one row is cut along the reduction too, so
    that the input gradient quantises the weight anew, along its outputs. `scales` are `float32` (amax / largest),
    `ue8m0` (powers of two, exact to repeat) or `mx` (powers of two, by OCP MX).

    Products accumulate exactly over `chunk` of the reduction, are rounded to fp32 once, scaled, and added up in
    fp32. With `promoted` false nothing is rounded until the end; an accumulator of fewer than 24 `bits` takes 32
    products at a time, and cuts each and the sum to that many. `stored` says that the weight comes as codes and
    scales, as they are.
    """

    tile: int
    block: tuple[int, int]
    scales: str
    weights: Narrow = E4M3
    activations: Narrow = E4M3
    gradients: Narrow = E4M3
    chunk: int = 128
    promoted: bool = True
    bits: int = 24
    stored: bool = False

    @property
    def exact_scales(self) -> bool:
        """Whether all scales are powers of two, so that q s has no more significant bits than q."""
        return self.scales != "float32" and not self.stored

    def of_stored(self) -> "Recipe":
        """The recipe of a weight that is stored as codes in blocks of 128x128, with scales of any size."""
        return attrs.evolve(self, block=(128, 128), stored=True)

    @property
    def anew(self) -> bool:
        """Whether the input gradient quantises the weight again, along its outputs."""
        return self.block[0] == 1

    @property
    def declared(self) -> bool:
        """Whether products accumulate as the policy declares by default; else only the emulation can tell."""
        return self.promoted and self.bits == 24

    def floor(self, form: Narrow) -> float:
        """The part f of its block's largest magnitude A, so that rounding errs by at most u (|v| + f A).

        u is `form.roundoff`. Below the normals a code errs by u `form.normal` s, and s is at most A / largest times
        how much a power of two may exceed it.
        """
        worst = {"float32": form.largest, "ue8m0": form.halfway / 2, "mx": form.largest / 1.75}[self.scales]
        return form.normal / worst

    def error_bound(self, inputs: int, gradient: bool = False) -> float:
        """The largest error of one element of a product over `inputs`, in units of its magnitude

            sum_k (|a_k| + f A_k) (|b_k| + f B_k)

        where A_k and B_k are the largest magnitudes in the blocks of a_k and b_k, and f is `floor`. Both factors
        are rounded to u, and their quotients before to fp32; then each chunk's sum is rounded once, twice by its
        scales, and once for each chunk that is added. `gradient` says that a is an output gradient.
        """
        a, b = (self.gradients if gradient else self.activations), self.weights
        # MX scales let the largest numbers saturate, by less than a step.
        steps = 2 if self.scales == "mx" else 1
        factors = (1 + steps * a.roundoff + 2.0**-23) * (1 + steps * b.roundoff + 2.0**-23)
        return factors * (1 + self.accumulation_error(inputs)) - 1

    def typical_error(self, gradient: bool = False) -> float:
        """The relative error, in the root mean square, of a product of random operands of either sign: both are rounded
        independently, and their errors add up as the products themselves do, whatever the length.
        """
        a = self.gradients if gradient else self.activations
        return hypot(a.spread, self.weights.spread)

    def accumulation_error(self, inputs: int) -> float:
        """The same for the accumulation alone, in units of sum_k |q_k s_k| |q'_k s'_k|.

        A narrow accumulator cuts 34 times for 32 products, each time less than its last bit; and no product, and no sum
        so far, is above the magnitudes' sum.
        """
        narrow = 0.0 if self.bits >= 24 else 34 * 2.0 ** -(self.bits - 1)
        if not self.promoted:
            return narrow * ceil(inputs / 32) + 2.0**-23
        return narrow * ceil(self.chunk / 32) + (ceil(inputs / self.chunk) + 3) * 2.0**-24

    def fast_error(self, inputs: int) -> float:
        """How far a product of dequantised operands, summed in fp32 in any order, is from the declared one, in units
        of sum_k |q_k s_k| |q'_k s'_k|: q s rounded for both, as many additions as products, and the declared rounding.
        """
        return (inputs + 2) * 2.0**-24 + self.accumulation_error(inputs)

    def operand(self, form: Narrow, block: tuple[int, int]) -> Operand:
        """How far rounding moves a number: by at most u (|v| + f A), f being `floor`; u has the quotient's rounding."""
        # MX scales let the largest numbers saturate, by less than a step.
        unit = (2 if self.scales == "mx" else 1) * form.roundoff + 2.0**-23
        return Operand(
            relative=unit,
            shared=unit * self.floor(form),
            least=unit * form.normal * SMALLEST_SCALE,
            block=block,
        )

    @property
    def rounding(self) -> Rounding:
        """The error of the three products, whichever implementation computes them."""
        tile = (1, self.tile) if self.tile else (0, 0)
        narrow = 0.0 if self.bits >= 24 else 34 * 2.0 ** -(self.bits - 1)
        chunks = ceil(self.chunk / 32)
        return Rounding(
            weight=self.operand(self.weights, self.block),
            turned=self.operand(self.weights, self.block if self.anew else self.block[::-1]),
            activation=self.operand(self.activations, tile),
            gradient=self.operand(self.gradients, tile),
            result=2.0**-24,
            # `accumulation_error` and `fast_error`, in a form that is linear in the length.
            each=2.0**-23 + (0.0 if self.promoted else narrow / 32),
            fixed=2.0**-21 + narrow * (chunks if self.promoted else 1),
        )
