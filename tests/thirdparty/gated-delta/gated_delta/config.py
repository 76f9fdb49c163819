"""`gated-delta` on paper: its maps, its state, its products.

Source: Gated DeltaNet, arXiv 2412.06464, section 3; names and the form of the gates are those of released models.
"""

from collections.abc import Iterable
from math import sqrt

from composeformer.config import Config, config, field, part
from composeformer.contracts import Cache, Constant, Core, Cost, Declared, Linear, Normal, Part, Phase, Weight
from composeformer.formats import BITS
from composeformer.site import Site


@config
class GatedDelta(Config):
    """Every head keeps one matrix, which each token decays, corrects at its key, and reads at its query.

    Initial values: normal with `init_std`, the output projection divided by sqrt(2 layers); decays of about
    0.88 a token, which the input moves.
    """

    num_heads: int = field(minimum=1, unit="heads", help="Heads, each with a state of its own.")
    k_head_dim: int = field(minimum=1, unit="features", help="Features of a head's query and key.")
    v_head_dim: int = field(minimum=1, unit="features", help="Features of a head's value.")
    norm: Part = part("norm", help="Normalises what a head reads.")
    chunk_size: int = field(
        64, minimum=1, unit="tokens", affects="execution", help="How many tokens `chunked` takes at once."
    )

    def tensors(self, site: Site) -> Iterable[Declared]:
        inner = Normal(site.spec.model.init_std)
        outer = Normal(site.spec.model.init_std / sqrt(2 * site.num_layers))
        heads, width = self.num_heads, site.width
        for name, size in (
            ("q", self.k_head_dim),
            ("k", self.k_head_dim),
            ("v", self.v_head_dim),
            ("z", self.v_head_dim),
        ):
            yield Linear(name=name, inputs=width, outputs=heads * size, shard="out", unit=size, init=inner)
        # A decay acts once for every token that follows: its rounding would, too.
        for name in ("a", "b"):
            yield Linear(name=name, inputs=width, outputs=heads, shard="out", sensitive=True, init=inner)
        yield Weight(name="A_log", shape=(heads,), dtype="float32", shard=0, init=Constant(0.0))
        yield Weight(name="dt_bias", shape=(heads,), dtype="float32", shard=0, init=Constant(-2.0))
        yield site.part(self.norm, "norm", width=self.v_head_dim)
        yield Linear(
            name="o",
            inputs=heads * self.v_head_dim,
            outputs=width,
            shard="in",
            unit=self.v_head_dim,
            init=outer,
        )

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        """A token reads its state twice, at its key and its query, and writes it once. The state is kept in fp32 at
        least: among bfloat16 elements each of its own counts as two.
        """
        elements = self.num_heads * self.k_head_dim * self.v_head_dim
        bits = BITS[site.spec.formats.activations]
        yield Core(name="recurrence", constant=3 * 2 * elements)
        yield Cache(name="state", constant=elements * max(bits, 32) // bits)
