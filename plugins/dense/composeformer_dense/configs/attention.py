"""`gqa`: grouped-query attention on paper.

Source: Ainslie et al., arXiv 2305.13245. As many key heads as query heads is the attention of Vaswani et
al. (arXiv 1706.03762), one key head is Shazeer's multi-query attention (arXiv 1911.02150).
"""

from collections.abc import Iterable
from math import sqrt
from typing import Self

import attrs

from composeformer.config import Config, config, field, part
from composeformer.contracts import (
    Cache,
    Constant,
    Core,
    Cost,
    Declared,
    Facts,
    Linear,
    Normal,
    Part,
    Phase,
    Saved,
    Weight,
)
from composeformer.conventions import Convention, Order, Swap, transposed, widened
from composeformer.errors import Problem
from composeformer.site import Site


@config
class GQA(Config):
    """Heads of `head_dim` features attend; `num_heads / num_kv_heads` of them share one key and value head.

    Initial values: normal with `init_std`; the output projection divided by sqrt(2 layers), so that the
    stream's variance does not grow with depth (GPT-2's scheme); biases and sinks zero.
    """

    num_heads: int = field(minimum=1, unit="heads", help="Query heads.")
    num_kv_heads: int | None = field(
        default=None,
        minimum=1,
        unit="heads",
        help="Key and value heads, a divisor of num_heads; absent: num_heads.",
    )
    head_dim: int | None = field(
        default=None, minimum=1, unit="features", help="Width of one head; absent: hidden_size / num_heads."
    )
    position: Part = part("position", help="Rotates queries and keys by their positions.")
    qkv_bias: bool = field(default=False, help="Biases on the query, key and value projections.")
    o_bias: bool = field(default=False, help="A bias on the output projection.")
    qk_norm: Part | None = part(
        "norm", optional=True, help="Normalises each query and key head before rotation; absent: none."
    )
    window: int | None = field(
        default=None,
        minimum=1,
        unit="tokens",
        help="A token sees itself and window - 1 before it; absent: all.",
    )
    cap: float | None = field(
        default=None, above=0.0, help="Soft cap: scores become cap * tanh(scores / cap)."
    )
    sinks: bool = field(default=False, help="A learnt logit per head that takes weight and gives no value.")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def head_width(self, width: int) -> int:
        """Features of one head where the mixer is `width` wide."""
        return width // self.num_heads if self.head_dim is None else self.head_dim

    def validate(self, site: Site) -> Iterable[Problem]:
        if self.num_heads % self.kv_heads:
            yield Problem("num_kv_heads", self.num_kv_heads, f"must divide num_heads ({self.num_heads})")
        if self.head_dim is None and site.width % self.num_heads:
            allowed = f"must divide hidden_size ({site.width}), or head_dim must be given"
            yield Problem("num_heads", self.num_heads, allowed)

    def filled(self, site: Site) -> Self:
        # mypy does not see that @config makes attrs classes.
        return attrs.evolve(self, num_kv_heads=self.kv_heads, head_dim=self.head_width(site.width))  # type: ignore[misc]

    def tensors(self, site: Site) -> Iterable[Declared]:
        width = self.head_width(site.width)
        inner = Normal(site.spec.model.init_std)
        outer = Normal(site.spec.model.init_std / sqrt(2 * site.num_layers))
        for name, heads in (("q", self.num_heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            yield Linear(
                name=name,
                inputs=site.width,
                outputs=heads * width,
                bias=self.qkv_bias,
                shard="out",
                unit=width,
                init=inner,
            )
        yield Linear(
            name="o",
            inputs=self.num_heads * width,
            outputs=site.width,
            bias=self.o_bias,
            shard="in",
            unit=width,
            init=outer,
        )
        yield site.part(self.position, "position", width=width)
        if self.qk_norm is not None:
            yield site.part(self.qk_norm, "q_norm", width=width, rows=self.num_heads)
            yield site.part(self.qk_norm, "k_norm", width=width, rows=self.kv_heads)
        if self.sinks:
            yield Weight(name="sinks", shape=(self.num_heads,), shard=0, init=Constant(0.0))

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        width = self.head_width(site.width)
        yield Core(name="attention", per_key=4 * self.num_heads * width, window=self.window)
        yield Cache(
            name="keys and values", per_token=2 * self.kv_heads * width, window=self.window, shard=True
        )
        if phase == "train":
            yield Saved(name="input", inputs=("q", "k", "v"))
            yield from self._kept(width)
            yield Saved(name="mixed", inputs=("o",))

    def _kept(self, width: int) -> Iterable[Saved]:
        """Of the attention core: the reference has fp32 operands, and scores as each of its operations reads them."""
        for name, linear, heads in (
            ("queries", "q", self.num_heads),
            ("keys", "k", self.kv_heads),
            ("values", "v", self.kv_heads),
        ):
            yield Saved(name=name, output=linear, implementations=("sdpa",))
            yield Saved(
                name=name, elements=heads * width, dtype="float32", shard=True, implementations=("reference",)
            )
        heads = self.num_heads
        yield Saved(name="log-sums", elements=heads, dtype="float32", shard=True, implementations=("sdpa",))
        # Weights, once more in another order where heads share keys, and what a cap keeps.
        scores = heads * (1 + (self.kv_heads < heads) + (self.cap is not None))
        yield Saved(
            name="scores", per_key=scores, dtype="float32", shard=True, implementations=("reference",)
        )

    def conventions(self, site: Site) -> Iterable[Convention]:
        width, group = self.head_width(site.width), self.num_heads // self.kv_heads
        names = ("weight", "bias") if self.qkv_bias else ("weight",)
        dims = {"weight": -2, "bias": -1}
        layout = getattr(self.position.config, "other_layout", None)
        if layout is not None:
            usual, other, order = layout(width)
            changes = [
                Order(tensor=f"{linear}.{name}", dim=dims[name], indices=order)
                for linear in ("q", "k")
                for name in names
            ]
            if self.qk_norm is not None:
                changes += [Order(tensor=f"{n}_norm.weight", dim=-1, indices=order) for n in ("q", "k")]
            yield Convention(name="rotary layout", usual=usual, other=other, changes=tuple(changes))
        if self.kv_heads > 1 and group > 1:
            heads = widened(transposed(self.kv_heads, group), width)
            orders = [Order(tensor=f"q.{name}", dim=dims[name], indices=heads) for name in names]
            yield Convention(
                name="order of query heads",
                usual="those of one key head together",
                other="those of one key head apart",
                changes=(*orders, Order(tensor="o.weight", dim=-1, indices=heads)),
            )
        swaps = tuple(Swap(first=f"k.{name}", second=f"v.{name}") for name in names)
        yield Convention(name="keys and values", usual="as named", other="exchanged", changes=swaps)


def sdpa_needs(facts: Facts) -> str | None:
    """Why PyTorch's scaled_dot_product_attention can not compute this attention, or None."""
    if facts.config.sinks:
        return "scaled_dot_product_attention has no sinks"
    if facts.config.cap is not None:
        return "scaled_dot_product_attention has no soft cap"
    return None
