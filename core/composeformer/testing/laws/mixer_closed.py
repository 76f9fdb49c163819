"""Laws that attention by the book claims: it is the loop over heads, tokens and keys that its papers write down.

They are held by parts with the maps and fields of the papers' names. `dot-product` (arXiv 1706.03762, 2305.13245): maps
q, k, v, o; `num_heads`, `num_kv_heads`, `head_dim`; `window`, `cap`, and sinks, q_norm and k_norm where they have them.
`latent` (arXiv 2405.04434, equations 37 to 47): maps q, or q_a and q_b, kv_a, kv_b, o; the widths of MLA's config.

Shapes: T tokens, H heads, D features of a head.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from composeformer.tensors import Rotary
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.mixing import mix, settled

LONGEST = 7


def compared(case: Case, by_the_book: Any) -> None:
    """A part beside a float64 loop over its judge's maps, for a row of tokens at any positions."""
    tokens = case.integer("tokens", 2, LONGEST)
    positions = torch.randint(
        40, (1, tokens), generator=torch.Generator().manual_seed(case.integer("positions", 0, 2**16))
    )
    x = settled(case, 1, tokens, positions=positions)
    with torch.no_grad():
        part: Any = case.part_of(case.judge)
        table = case.judge.rotary(positions)[part.position.key]
        found = mix(case, case.model, x, positions=positions)
        heads_THV = by_the_book(case.config, part, x.double(), table)
        case.close(found, part.o(heads_THV.flatten(1))[None], "beside the loop of the paper", terms=tokens)


def attended(
    config: Any, q_THD: Tensor, k_THD: Tensor, v_THV: Tensor, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Each token's mean of values in float64, by the softmax of its scores with itself and those before it."""
    q_THD, k_THD, v_THV = (each.double() for each in (q_THD, k_THD, v_THV))
    window, cap = getattr(config, "window", None) or len(q_THD), getattr(config, "cap", None)
    rows = []
    for t, q_HD in enumerate(q_THD):
        seen = slice(max(0, t + 1 - window), t + 1)
        scores_SH = (q_HD * k_THD[seen]).sum(-1) * scale
        if cap is not None:
            scores_SH = cap * torch.tanh(scores_SH / cap)
        top_H = scores_SH.max(0).values
        weights_SH = torch.exp(scores_SH - top_H)
        total_H = weights_SH.sum(0) + (0 if sinks is None else torch.exp(sinks - top_H))
        rows.append(((weights_SH / total_H)[..., None] * v_THV[seen]).sum(0))
    return torch.stack(rows)


def dot_product_heads(config: Any, part: Any, x: Tensor, table: Rotary) -> Tensor:
    """Grouped queries (T, H, D)."""
    scale, sinks = config.head_dim**-0.5, getattr(part, "sinks", None)
    return attended(config, *grouped(config, part, x, table), scale, sinks)


def grouped(config: Any, part: Any, x: Tensor, table: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (T, H, D) of a row: query head h reads key head h // (H / K)."""
    q, k, v = (linear(x).unflatten(-1, (-1, config.head_dim)) for linear in (part.q, part.k, part.v))
    if getattr(part, "q_norm", None) is not None:
        q, k = part.q_norm(q), part.k_norm(k)
    q, k = part.position.rotate(q, table), part.position.rotate(k, table)
    group = config.num_heads // config.num_kv_heads
    of_head = [head // group for head in range(config.num_heads)]
    return q[0], k[0, :, of_head].to(q.dtype), v[0, :, of_head].to(q.dtype)


def latent_heads(config: Any, part: Any, x: Tensor, table: Rotary) -> Tensor:
    """Heads (T, H, V) with keys and values written out of the latents; one rotary key for all."""
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    q = part.q(x) if config.q_lora_rank is None else part.q_b(part.q_a_norm(part.q_a(x)))
    q = q.unflatten(-1, (config.num_heads, nope + rope))
    joint = part.kv_a(x)
    latent, shared = part.kv_a_norm(joint[..., : config.kv_lora_rank]), joint[..., config.kv_lora_rank :]
    kv = part.kv_b(latent).unflatten(-1, (config.num_heads, nope + value))
    turned = part.position.rotate(q[..., nope:], table)
    key = part.position.rotate(shared[:, :, None], table).expand_as(turned)
    q, k = torch.cat([q[..., :nope], turned], -1), torch.cat([kv[..., :nope], key], -1)
    scale = getattr(config.position.config, "score_scale", 1.0) / sqrt(nope + rope)
    return attended(config, q[0], k[0], kv[0, ..., nope:], scale)


@law(
    "mixer",
    "dot-product",
    "grouped-query attention is the loop of its papers",
    kills="cap-before-the-scale",
    claimed=True,
    examples=12,
)
def dot_product(case: Case) -> None:
    for name in ("q", "k", "v"):
        case.equal(case.node.linears[name].bias, case.config.qkv_bias, f"whether {name} has a bias")
    compared(case, dot_product_heads)


@law(
    "mixer",
    "latent",
    "latent attention is the loop of its paper, each head's keys and values written out",
    kills="scale-of-the-unrotated-width",
    claimed=True,
    examples=12,
)
def latent(case: Case) -> None:
    compared(case, latent_heads)
