"""`mla`: multi-head latent attention on paper.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437, section 2.1.1. Names and
the place of the biases are those of the released configs.
"""

from collections.abc import Iterable
from math import sqrt

from composeformer.config import Config, config, field, part
from composeformer.contracts import Cache, Core, Cost, Declared, Linear, Normal, Part, Phase, Saved
from composeformer.conventions import Convention, Order, after, exchanged, gathered
from composeformer.errors import Problem
from composeformer.formats import BITS
from composeformer.site import Site


@config
class MLA(Config):
    """Every head reads its keys and values out of one latent per token, and shares one rotary key.

    Initial values: normal with `init_std`; the output projection divided by sqrt(2 layers), so that the
    stream's variance does not grow with depth (GPT-2's scheme); biases zero.
    """

    num_heads: int = field(minimum=1, unit="heads", help="Heads, each with its own queries, keys and values.")
    q_lora_rank: int | None = field(
        None,
        minimum=1,
        unit="features",
        help="Width of the queries' latent; absent: queries come straight from the input.",
    )
    kv_lora_rank: int = field(
        minimum=1, unit="features", help="Width of the latent that keys and values are read from."
    )
    qk_nope_head_dim: int = field(
        minimum=1, unit="features", help="Features of a head's query and key without a position."
    )
    qk_rope_head_dim: int = field(
        minimum=1,
        unit="features",
        help="Features of a head's query, and of the shared key, that are rotated.",
    )
    v_head_dim: int = field(minimum=1, unit="features", help="Features of a head's value.")
    position: Part = part(
        "position", help="Rotates the rotary features; released weights have them in interleaved pairs."
    )
    norm: Part = part("norm", help="Normalises the latents.")
    attention_bias: bool = field(
        False, help="Biases on the maps to the latents and on the output projection."
    )
    window: int | None = field(
        None, minimum=1, unit="tokens", help="A token sees itself and window - 1 before it; absent: all."
    )

    @property
    def qk_head_dim(self) -> int:
        """Features that a query and a key meet in."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def scale(self) -> float:
        """What scores are multiplied by: a position that stretches the context may sharpen them."""
        sharpened: float = getattr(self.position.config, "score_scale", 1.0)
        return sharpened / sqrt(self.qk_head_dim)

    def validate(self, site: Site) -> Iterable[Problem]:
        width = self.qk_rope_head_dim
        turns = getattr(self.position.config, "rotary_width", None)
        if width % 2 and turns is not None and turns(width) == width:
            yield Problem("qk_rope_head_dim", width, "must be even: features turn in pairs")

    def tensors(self, site: Site) -> Iterable[Declared]:
        inner = Normal(site.spec.model.init_std)
        outer = Normal(site.spec.model.init_std / sqrt(2 * site.num_layers))
        queries = self.num_heads * self.qk_head_dim
        if self.q_lora_rank is None:
            yield Linear(
                name="q", inputs=site.width, outputs=queries, shard="out", unit=self.qk_head_dim, init=inner
            )
        else:
            yield Linear(
                name="q_a", inputs=site.width, outputs=self.q_lora_rank, bias=self.attention_bias, init=inner
            )
            yield site.part(self.norm, "q_a_norm", width=self.q_lora_rank)
            yield Linear(
                name="q_b",
                inputs=self.q_lora_rank,
                outputs=queries,
                shard="out",
                unit=self.qk_head_dim,
                init=inner,
            )
        yield Linear(
            name="kv_a",
            inputs=site.width,
            outputs=self.kv_lora_rank + self.qk_rope_head_dim,
            bias=self.attention_bias,
            init=inner,
        )
        yield site.part(self.norm, "kv_a_norm", width=self.kv_lora_rank)
        unit = self.qk_nope_head_dim + self.v_head_dim
        yield Linear(
            name="kv_b",
            inputs=self.kv_lora_rank,
            outputs=self.num_heads * unit,
            shard="out",
            unit=unit,
            init=inner,
        )
        yield Linear(
            name="o",
            inputs=self.num_heads * self.v_head_dim,
            outputs=site.width,
            bias=self.attention_bias,
            shard="in",
            unit=self.v_head_dim,
            init=outer,
        )
        yield site.part(self.position, "position", width=self.qk_rope_head_dim)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        """Decoding is absorbed: fewer bytes, more products. Folding `kv_b` into a token's query and output
        takes as many as that linear map of a token, and is counted there.
        """
        if phase == "decode":
            met, mixed = self.kv_lora_rank + self.qk_rope_head_dim, self.kv_lora_rank
        else:
            met, mixed = self.qk_head_dim, self.v_head_dim
        per_key = 2 * self.num_heads * (met + mixed)
        per_token = self.kv_lora_rank + self.qk_rope_head_dim
        yield Core(name="attention", per_key=per_key, window=self.window)
        yield Cache(name="latent and rotary key", per_token=per_token, window=self.window)
        if phase == "train":
            yield Saved(name="input", inputs=("kv_a", "q" if self.q_lora_rank is None else "q_a"))
            # A norm of fp32 latents keeps the very tensor that also has the rotary key.
            yield from self._kept(whole=BITS[site.spec.formats.activations] >= BITS["float32"])
            yield Saved(name="mixed", inputs=("o",))

    def _kept(self, whole: bool) -> Iterable[Saved]:
        """Between the first maps and the last. What is made of latents is made of them again: arXiv 2412.19437, section
        3.2.3. It needs the rotary key, too.
        """
        written = ("expanded", "reference")
        queries = None if self.q_lora_rank is None else "none"
        if queries is not None:
            yield Saved(name="latent of queries", inputs=("q_b",), recompute=queries)
        yield Saved(name="latent", inputs=("kv_b",), implementations=written, recompute="none")
        key = self.qk_rope_head_dim
        if whole:
            yield Saved(name="rotary key", elements=key)
        else:
            yield Saved(name="rotary key", elements=key, implementations=written, recompute="selective")
        yield from self._expanded(queries)
        yield from self._reference(queries)
        yield from self._absorbed(queries)

    def _expanded(self, queries: str | None) -> Iterable[Saved]:
        """Queries, keys and values are as wide as the widest of them; unpadded values are a view, of keys too."""
        only, heads, met, value = ("expanded",), self.num_heads, self.qk_head_dim, self.v_head_dim
        padded = value < met
        wide = heads * max(met, value)
        values = wide if padded else heads * (self.qk_nope_head_dim + value)
        for name, elements, recompute in (
            ("queries", wide, queries),
            ("keys", wide, "none"),
            ("values", values, "none"),
            ("mixed, padded", wide if padded else 0, None),
        ):
            yield Saved(name=name, elements=elements, shard=True, implementations=only, recompute=recompute)
        yield Saved(name="log-sums", elements=heads, dtype="float32", shard=True, implementations=only)

    def _reference(self, queries: str | None) -> Iterable[Saved]:
        for name, width, scores, recompute in (
            ("queries", self.qk_head_dim, 0, queries),
            ("keys", self.qk_head_dim, 0, "none"),
            ("values", self.v_head_dim, 0, "none"),
            ("scores", 0, self.num_heads, None),
        ):
            yield Saved(
                name=name,
                elements=self.num_heads * width,
                per_key=scores,
                dtype="float32",
                shard=True,
                implementations=("reference",),
                recompute=recompute,
            )

    def _absorbed(self, queries: str | None) -> Iterable[Saved]:
        only, heads, rank, rope = ("absorbed",), self.num_heads, self.kv_lora_rank, self.qk_rope_head_dim
        for name, elements, dtype, recompute in (
            ("queries", heads * self.qk_head_dim, None, queries),
            ("rotary queries", heads * rope, "float32", queries),
            ("queries of latents", heads * rank, "float32", queries),
            ("mixed latents", heads * rank, None, None),
        ):
            yield Saved(
                name=name,
                elements=elements,
                dtype=dtype,
                shard=True,
                implementations=only,
                recompute=recompute,
            )
        yield Saved(name="latent", elements=rank, dtype="float32", implementations=only)
        yield Saved(name="turned key", elements=rope, dtype="float32", implementations=only)
        yield Saved(name="scores", per_key=heads, dtype="float32", shard=True, implementations=only)

    def conventions(self, site: Site) -> Iterable[Convention]:
        heads, rank = self.num_heads, self.kv_lora_rank
        nope, rope, value = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        queries = "q" if self.q_lora_rank is None else "q_b"

        def orders(query: tuple[int, ...], latent: tuple[int, ...]) -> tuple[Order, ...]:
            biased = (Order(tensor="kv_a.bias", dim=-1, indices=latent),) if self.attention_bias else ()
            return (
                Order(tensor=f"{queries}.weight", dim=-2, indices=query),
                Order(tensor="kv_a.weight", dim=-2, indices=latent),
                *biased,
            )

        layout = getattr(self.position.config, "other_layout", None)
        if layout is not None:
            usual, other, order = layout(rope)
            changes = orders(after(nope, order), after(rank, order))
            yield Convention(name="rotary layout", usual=usual, other=other, changes=changes)
        yield Convention(
            name="rotary features",
            usual="behind the others",
            other="before the others",
            changes=orders(exchanged(nope, rope), exchanged(rank, rope)),
        )
        apart = Order(tensor="kv_b.weight", dim=-2, indices=gathered(heads, nope, value))
        yield Convention(
            name="keys and values in kv_b", usual="head by head", other="all keys first", changes=(apart,)
        )
        turned = Order(tensor="kv_b.weight", dim=-2, indices=exchanged(nope, value))
        yield Convention(
            name="keys and values in kv_b", usual="keys first", other="values first", changes=(turned,)
        )
