"""`swiglu`: the feed-forward network and its gated variants on paper.

Sources: Shazeer, arXiv 2002.05202 (gated linear units); So et al., arXiv 2109.08668 (relu2).
"""

from collections.abc import Iterable
from math import sqrt

from composeformer.config import Config, config, field
from composeformer.contracts import Cost, Declared, Linear, Normal, Phase, Saved
from composeformer.conventions import Convention, Swap
from composeformer.site import Site

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@config
class SwiGLU(Config):
    """down(activation(gate(x)) * up(x)); without a gate down(activation(up(x))).

    Initial values: normal with `init_std`, `down` divided by sqrt(2 layers); biases zero.
    """

    intermediate_size: int = field(minimum=1, unit="features", help="Width between the projections.")
    activation: str = field(
        default="silu", choices=ACTIVATIONS, help="The nonlinearity; gelu_tanh is gelu's tanh form."
    )
    gated: bool = field(default=True, help="Multiply the activated gate into up; false: no gate.")
    bias: bool = field(default=False, help="Biases on all projections.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        inner = Normal(site.spec.model.init_std)
        outer = Normal(site.spec.model.init_std / sqrt(2 * site.num_layers))
        for name in ("gate", "up") if self.gated else ("up",):
            yield Linear(
                name=name,
                inputs=site.width,
                outputs=self.intermediate_size,
                bias=self.bias,
                shard="out",
                init=inner,
            )
        yield Linear(
            name="down",
            inputs=self.intermediate_size,
            outputs=site.width,
            bias=self.bias,
            shard="in",
            init=outer,
        )

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        """The nonlinearity keeps what it reads, but `relu` its result, and `relu2` what it squares."""
        if phase != "train":
            return
        yield Saved(name="input", inputs=("gate", "up") if self.gated else ("up",))
        if self.activation != "relu":
            yield Saved(name="before activation", output="gate" if self.gated else "up")
        if self.gated:
            yield Saved(name="activated", output="gate", recompute="none")
            yield Saved(name="up", output="up")
        yield Saved(name="inner", inputs=("down",), recompute="none")

    def conventions(self, site: Site) -> Iterable[Convention]:
        if self.gated:
            names = ("weight", "bias") if self.bias else ("weight",)
            swaps = tuple(Swap(first=f"gate.{name}", second=f"up.{name}") for name in names)
            yield Convention(name="gate and up", usual="as named", other="exchanged", changes=swaps)
