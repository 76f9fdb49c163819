"""Number formats, without torch: how a tensor is stored, multiplied, gathered and updated.

A precision policy answers `format(...)` for every tensor of a plan; memory, traffic and placement are
derived from the answers. Dtypes are spelled as in `tensors.DTYPES`; a policy may add narrower ones.
"""

from typing import TYPE_CHECKING, Protocol

import attrs

from composeformer.contracts import Weight

if TYPE_CHECKING:
    from composeformer.rounding import Operand


@attrs.frozen(kw_only=True)
class Format:
    """The format of one tensor.

    `storage` is the dtype of the parameter that an optimizer updates, `compute` that of the products (or of
    whatever a plain weight enters), `gather` what travels when shards are gathered, `gradient` what travels
    when gradients are reduced, `moment` the optimizer's averages. `bits` is the width of one element as it is
    multiplied; a `block` of (outputs, inputs) elements shares one scale of dtype `scale`. `codec` is the kind of
    the codec in whose form the tensor is stored, its codes in `storage`; None: it is stored plainly. `why` tells
    a user.
    """

    storage: str
    compute: str
    bits: int
    gather: str
    gradient: str
    moment: str
    block: tuple[int, int] | None = None
    scale: str | None = None
    codec: str | None = None
    why: str = ""


class PrecisionConfig(Protocol):
    """What the config of a `precision` component offers besides its fields.

    Rules come with `precision.Precision`, and `rounding`, the declared error that laws hold it to.
    """

    @property
    def activations(self) -> str:
        """The dtype of the residual stream and of what mixers cache."""

    def format(self, role: str, weight: Weight, sensitive: bool) -> Format:
        """The format of a tensor: `role` is the linear map's dotted name, or a plain weight's full name.

        A plain weight is passed as sensitive; a map that a rule names is not, whatever it declares. A dtype that
        the weight itself fixes wins over the policy. The bias of a map has the map's role and a name that ends in
        `.bias`.
        """


class CodecConfig(Protocol):
    """What the config of a `codec` component offers: a form in which weights are stored."""

    @property
    def rounding(self) -> "Operand":
        """How far encoding may move a number."""

    def stored(self, weight: Weight) -> tuple[Weight, ...]:
        """The tensors that hold `weight`: its codes under its own name, then others (scales), none of them trains."""

    def cut(self, dim: int, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """Where to cut what holds a weight so that it holds [start, stop) of dimension -2 or -1, from and to, along the
        same dimension of each tensor. Codes may begin before `start`, at the edge of a block.
        """


BITS: dict[str, int] = {
    "float64": 64,
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "float8_e8m0fnu": 8,
    "int64": 64,
    "int8": 8,
    "uint8": 8,
    "bool": 8,
}


def plain(dtype: str, why: str) -> Format:
    """One dtype for everything: what unscaled formats and fixed dtypes are."""
    return Format(
        storage=dtype, compute=dtype, bits=BITS[dtype], gather=dtype, gradient=dtype, moment=dtype, why=why
    )
