"""What a part says of itself, without torch: its tensors, its cost, its implementations.

A component's config yields these records; the core derives counts, roles, memory, placement, formats,
initial values and the meta build from them, and tests them against what is built and counted.
Quantities are in elements and floating-point operations (two for a multiply and an add), never in
bytes or seconds: a precision policy and a machine turn one into the other.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import attrs

from composeformer.config import Config

if TYPE_CHECKING:
    from composeformer.site import Site

Phase = Literal["train", "prefill", "decode"]
PHASES: tuple[Phase, ...] = ("train", "prefill", "decode")
Shard = Literal["out", "in", "group"]

SLOTS: dict[str, str] = {
    "embedding": "token ids to hidden states",
    "head": "hidden states to logits",
    "mixer": "mixes information across positions: attention, recurrences",
    "ffn": "transforms each position alone: feed-forward networks, experts",
    "router": "chooses experts for each token",
    "norm": "normalises the last dimension",
    "position": "positions as rotary tables",
    "residual": "owns the residual stream and its norms",
    "predictor": "predicts further tokens from hidden states",
    "precision": "chooses number formats of linear maps by role",
    "codec": "encodes tensors in a storage format",
    "comm": "moves tokens to experts and back",
    "objective": "the training loss",
    "optimizer": "updates parameters from gradients",
    "schedule": "a value as a function of tokens seen",
    "data": "training batches",
}
# A model has one of each of these; the others may be named several times.
SINGLE = (
    "embedding",
    "head",
    "residual",
    "predictor",
    "precision",
    "comm",
    "objective",
    "optimizer",
    "schedule",
    "data",
)
# What a layer can have, in the order of computation.
SUBLAYERS = ("mixer", "ffn")
# These describe a run and are never part of a model's identity.
RUN_SLOTS = ("precision", "comm", "objective", "optimizer", "schedule", "data")


@attrs.frozen
class Normal:
    """Initial values from a normal distribution with mean 0."""

    std: float


@attrs.frozen
class Constant:
    """Initial values that are all the same."""

    value: float


Init = Normal | Constant


@attrs.frozen(kw_only=True)
class Linear:
    """A linear map y = x W^T + b. Its role is the part's path and this name.

    `groups` makes it a stack of maps, of which a token passes through `active` (all by default).
    `shard` names the dimension that tensor or expert parallelism may cut, in whole `unit`s (heads, say).
    A `sensitive` map stays in high precision unless a rule names it. With `same_as` the weight is the
    tensor of that full name.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    groups: int | None = None
    active: int | None = None
    shard: Shard | None = None
    unit: int = 1
    sensitive: bool = False
    init: Init | None = None
    same_as: str | None = None

    @cached_property
    def weight(self) -> "Weight":
        shape = (
            (self.outputs, self.inputs) if self.groups is None else (self.groups, self.outputs, self.inputs)
        )
        return Weight(name=f"{self.name}.weight", shape=shape, init=self.init, same_as=self.same_as)

    @cached_property
    def weights(self) -> tuple["Weight", ...]:
        """The tensors of this map: the weight, and the bias if there is one."""
        if not self.bias:
            return (self.weight,)
        shape = (self.outputs,) if self.groups is None else (self.groups, self.outputs)
        return (self.weight, Weight(name=f"{self.name}.bias", shape=shape, init=Constant(0.0)))

    @property
    def flops(self) -> int:
        """Forward floating-point operations for one token."""
        return 2 * self.inputs * self.outputs * self.active_groups

    @property
    def active_groups(self) -> int:
        return self.active if self.active is not None else self.groups or 1


@attrs.frozen(kw_only=True)
class Weight:
    """A tensor that is no linear map: a norm's scale, a table, a sink.

    `dtype` fixes the dtype whatever the policy says, and no cast of the model changes it. With `trains=False` it is a
    buffer: saved, moved, never in `parameters()`. `same_as` is the full name of the tensor that this one is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    shard: int | None = None
    trains: bool = True
    same_as: str | None = None
    init: Init | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape)


@attrs.frozen(eq=False)
class Component:
    """A way to fill a slot, as a plugin registers it.

    `revision` rises when the function that the same values describe changes. `default` makes this kind
    the one that a spec gets when it says nothing of the slot. `claims` are optional laws it promises,
    `strategy` a hypothesis strategy of tiny configs by dotted name.
    """

    slot: str
    kind: str
    config: type[Config]
    implementations: tuple["Implementation", ...]
    summary: str = ""
    revision: int = 1
    default: bool = False
    claims: tuple[str, ...] = ()
    strategy: str | None = None


@attrs.frozen
class Facts:
    """What an implementation may look at to say whether it serves: the site with its config, and the machine."""

    config: Any
    site: "Site"
    phase: Phase
    device: str
    dtype: str


@attrs.frozen(eq=False)
class Implementation:
    """One way to compute a component: the class of an `nn.Module`, by dotted name `package.module:Class`.

    All implementations of a component share one state: classes with the same attributes, usually
    subclasses of the reference. `needs(facts)` gives the reason why it can not serve, or None.
    """

    name: str
    module: str
    phases: tuple[Phase, ...] = PHASES
    needs: Callable[[Facts], str | None] | None = None


@attrs.frozen
class Part:
    """A component chosen and configured: what a field that takes a part holds.

    `name` is how the spec calls it and `paths` where the spec states it, the nearest first; they say
    nothing about the function computed, nor does the choice of an `implementation` for each phase.
    """

    slot: str
    kind: str
    config: Any
    component: Component = attrs.field(eq=False, repr=False)
    name: str = attrs.field(eq=False)
    paths: tuple[tuple[str | int, ...], ...] = attrs.field(eq=False, repr=False, default=())
    implementation: tuple[tuple["Phase", str], ...] = attrs.field(eq=False, repr=False, default=())

    def chosen(self, phase: "Phase") -> str:
        """The implementation asked for in `phase`: a name, or `auto`."""
        return dict(self.implementation).get(phase, "auto")


@attrs.frozen
class LayerParts:
    """What one layer joins; None where the layer has none."""

    mixer: Part | None
    ffn: Part | None

    def items(self) -> list[tuple[str, Part]]:
        """Slot and part of what is there, in the order of computation."""
        return [(slot, part) for slot, part in (("mixer", self.mixer), ("ffn", self.ffn)) if part is not None]


@attrs.frozen(kw_only=True)
class Child:
    """A part inside a part: built at `<path>.<name>`, `width` features wide.

    `sublayers` names what a residual joins there, `sizes` what the parent tells of itself (a router's number
    of experts); both are read from the child's site. It gets `rows` rows for each one of the parent (a norm of
    heads as many as there are), and with `same_input` reads the very tensor that the parent does.
    """

    name: str
    part: Part
    width: int
    sublayers: tuple[str, ...] = ()
    sizes: Mapping[str, int] = attrs.field(factory=dict)
    rows: int = 1
    same_input: bool = False


Declared = Linear | Weight | Child


@attrs.frozen(kw_only=True)
class Core:
    """Products of activations with activations, per token: `per_key` for each key it sees, and a `constant`.

    `window` bounds the keys seen. FLOPs of the forward pass.
    """

    name: str
    per_key: float = 0.0
    constant: float = 0.0
    window: int | None = None

    def flops(self, context: float, causal: bool) -> float:
        """Mean FLOPs per token of a sequence of `context` tokens; causal means half of the square."""
        return self.constant + self.per_key * mean_keys(context, self.window, causal)


@attrs.frozen(kw_only=True)
class Cache:
    """What decoding keeps: `per_token` elements for each cached token (at most `window` of them), and a `constant`.
    `shard` says that tensor parallelism divides them, as it does heads.
    """

    name: str
    per_token: int = 0
    constant: int = 0
    window: int | None = None
    shard: bool = False

    def elements(self, context: int) -> int:
        """Elements held for one sequence of `context` tokens."""
        return self.constant + self.per_token * (
            context if self.window is None else min(context, self.window)
        )


@attrs.frozen(kw_only=True)
class Exchange:
    """Elements per token that leave for other processes, to `fan_out` destinations."""

    name: str
    elements: int
    fan_out: int


@attrs.frozen(kw_only=True)
class Saved:
    """A tensor of activations that training keeps for the backward pass, whichever operations read it there.

    Of each row that the part gets it has `elements`, and `per_key` more for each token of the sequence; or it is what
    the linear maps `inputs` read, or as large as the result of the map `output`: then its dtype, and whether tensor
    parallelism divides it, are theirs. Elsewhere `dtype` says the one (None: that of activations; `float32` means
    that or wider), and `shard` that it is divided. What a part reads is named `input`: whoever keeps it in one dtype
    keeps it once. A part that keeps nothing says so by a `Saved` of no elements.

    `implementations` are those that keep it; none named: all. `recompute` is the choice of `parallel.recompute` under
    which alone it is kept: `none` for what is cheaply made again, `selective` for what that is made from.
    """

    name: str
    elements: int = 0
    per_key: int = 0
    inputs: tuple[str, ...] = ()
    output: str | None = None
    dtype: str | None = None
    shard: bool = False
    implementations: tuple[str, ...] = ()
    recompute: str | None = None


@attrs.frozen(kw_only=True)
class Uses:
    """A part of the model that this one runs again, `times` for each token: a predictor the head."""

    name: str
    slot: str
    times: int


Cost = Core | Cache | Exchange | Saved | Uses


def mean_keys(context: float, window: int | None, causal: bool) -> float:
    """Mean number of keys that a token of a sequence sees.

    The paper's convention: S with a full mask, S/2 with a causal one; with a window w < S they are w and
    w - w^2 / 2S, the mean of min(t, w) over t in [0, S].
    """
    reach = context if window is None else min(context, window)
    return reach - reach * reach / (2 * context) if causal and context else reach
