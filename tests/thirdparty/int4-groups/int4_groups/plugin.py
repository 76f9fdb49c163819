"""Registers the precision `int4-groups`, and says what it is on paper. Imports no torch.

    w ~ q s        q = round(7 w / A), s = A / 7, A the largest magnitude of the group's weights

Sources: Bengio et al., arXiv 1308.3432 (gradients pass the rounding as they are); Dettmers and Zettlemoyer, arXiv
2212.09720 (four bits, small groups).
"""

from collections.abc import Iterable

import attrs

from composeformer.config import config, field
from composeformer.contracts import Component, Implementation, Weight
from composeformer.formats import Format, plain
from composeformer.hookspecs import hookimpl
from composeformer.precision import Precision

LARGEST = 7


@config
class Int4Groups(Precision):
    """Linear maps of integers from -7 to 7, with a scale for each group of inputs; sensitive ones stay in float32.

    Its declared error is what `format` says of itself: half a step of a group, which is A / 14, and sums in fp32.
    """

    group_size: int = field(
        32,
        choices=(16, 32, 64, 128),
        unit="inputs",
        affects="execution",
        help="How many inputs of an output share a scale.",
    )

    @property
    def activations(self) -> str:
        return "bfloat16"

    def format(self, role: str, weight: Weight, sensitive: bool) -> Format:
        if weight.dtype is not None:
            return plain(weight.dtype, "fixed by its part")
        if sensitive or weight.name.endswith(".bias"):
            return plain("float32", "sensitive" if sensitive else "a bias")
        found = plain("float32", f"four bits, groups of {self.group_size}")
        return attrs.evolve(found, bits=4, block=(1, self.group_size), scale="float32")


@hookimpl
def compose_components() -> Iterable[Component]:
    yield Component(
        "precision",
        "int4-groups",
        Int4Groups,
        (Implementation("reference", "int4_groups.module:Int4Policy"),),
        summary="four-bit weights, a scale for a group of inputs",
    )
