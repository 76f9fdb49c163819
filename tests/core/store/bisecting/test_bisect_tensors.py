"""Each convention that tensors alone can tell, planted in turn: named where a part states it, else described."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

State = dict[str, Tensor]
Edit = Callable[[State], Mapping[str, Tensor]]


def each(ending: str, change: Callable[[Tensor], Tensor]) -> Edit:
    """The same done to every tensor whose name ends so."""
    return lambda state: {name: change(t) for name, t in state.items() if name.endswith(ending)}


def swapped(first: str, second: str) -> Edit:
    def edit(state: State) -> State:
        found = {}
        for name in state:
            if name.endswith(first):
                other = name.removesuffix(first) + second
                found |= {name: state[other], other: state[name]}
        return found

    return edit


def both(*edits: Edit) -> Edit:
    def edit(state: State) -> State:
        found: State = {}
        for one in edits:
            found |= one(state | found)
        return found

    return edit


def in_pairs(x: Tensor) -> Tensor:
    """Features of dimension 0, in halves before: 0, R/2, 1, R/2 + 1, ..."""
    return torch.stack(x.chunk(2), 1).flatten(0, 1)


def in_halves(x: Tensor) -> Tensor:
    return torch.cat([x[0::2], x[1::2]])


def per_head(x: Tensor, heads: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([change(head) for head in x.chunk(heads)])


def tail(x: Tensor, size: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([x[:-size], change(x[-size:])])


def front(x: Tensor, size: int) -> Tensor:
    """The last features first."""
    return torch.cat([x[-size:], x[:-size]])


def gathered(x: Tensor) -> Tensor:
    """Of four heads, 10 keys and 8 values each: all keys, then all values."""
    heads = x.unflatten(0, (4, 18))
    return torch.cat([heads[:, :10].flatten(0, 1), heads[:, 10:].flatten(0, 1)])


MLA = "deepseek_v3"
MTP = "deepseek_v3+mtp"
HALVES = both(
    each("mixer.q_b.weight", lambda w: per_head(w, 4, lambda h: tail(h, 6, in_halves))),
    each("mixer.kv_a.weight", lambda w: tail(w, 6, in_halves)),
)
ROPE_FIRST = both(
    each("mixer.q_b.weight", lambda w: per_head(w, 4, lambda h: front(h, 6))),
    each("mixer.kv_a.weight", lambda w: front(w, 6)),
)
PAIRS = both(
    each("mixer.q.weight", lambda w: per_head(w, 4, in_pairs)),
    each("mixer.k.weight", lambda w: per_head(w, 2, in_pairs)),
)
BIASED_PAIRS = both(
    PAIRS,
    each("mixer.q.bias", lambda b: per_head(b, 4, in_pairs)),
    each("mixer.k.bias", lambda b: per_head(b, 2, in_pairs)),
)
APART = both(
    each("mixer.q.weight", lambda w: w.unflatten(0, (2, 2, 8)).transpose(0, 1).flatten(0, 2)),
    each("mixer.o.weight", lambda w: w.unflatten(1, (2, 2, 8)).transpose(1, 2).flatten(1, 3)),
)

# Family, what was done to the tensors, the component that differs first, the change's name, and how it is here.
PLANTED: dict[str, tuple[str, Edit, str, str, str]] = {
    "rotary pairs": ("llama", PAIRS, "layers.0.mixer", "rotary layout of mixer gqa", "interleaved"),
    "rotary pairs of biases too": (
        "biased",
        BIASED_PAIRS,
        "layers.0.mixer",
        "rotary layout of mixer gqa",
        "interleaved",
    ),
    "rotary pairs of keys alone": (
        "mixtral",
        each("mixer.k.weight", lambda w: per_head(w, 2, in_pairs)),
        "layers.0.mixer",
        "rotary layout of mixer gqa",
        "interleaved",
    ),
    "rotary pairs of norms": (
        "qwen3",
        both(PAIRS, each("mixer.q_norm.weight", in_pairs), each("mixer.k_norm.weight", in_pairs)),
        "layers.0.mixer.q_norm",
        "rotary layout of mixer gqa",
        "interleaved",
    ),
    "rotary halves of latent attention": (
        MLA,
        HALVES,
        "layers.0.mixer",
        "rotary layout of mixer mla",
        "half-split",
    ),
    "rotary features first": (
        MLA,
        ROPE_FIRST,
        "layers.0.mixer.kv_a_norm",
        "rotary features of mixer mla",
        "before the others",
    ),
    "all keys first": (
        MLA,
        each("kv_b.weight", gathered),
        "layers.0.mixer",
        "keys and values in kv_b of mixer mla",
        "all keys first",
    ),
    "values before keys": (
        MLA,
        each("kv_b.weight", lambda w: per_head(w, 4, lambda h: front(h, 8))),
        "layers.0.mixer",
        "keys and values in kv_b of mixer mla",
        "values first",
    ),
    "query heads apart": (
        "llama",
        APART,
        "layers.0.mixer",
        "order of query heads of mixer gqa",
        "those of one key head apart",
    ),
    "keys and values": (
        "qwen3",
        swapped("mixer.k.weight", "mixer.v.weight"),
        "layers.0.mixer.k_norm",
        "keys and values of mixer gqa",
        "exchanged",
    ),
    "gate and up": (
        "llama",
        swapped("ffn.gate.weight", "ffn.up.weight"),
        "layers.0.ffn",
        "gate and up of ffn swiglu",
        "exchanged",
    ),
    "gate and up of experts": (
        "mixtral",
        swapped("ffn.gate.weight", "ffn.up.weight"),
        "layers.0.ffn",
        "gate and up of ffn moe",
        "exchanged",
    ),
    "places of norms": (
        "llama",
        swapped("mixer_norm.weight", "ffn_norm.weight"),
        "layers.0.residual.mixer_norm",
        "norms of the sublayers of residual pre-norm",
        "exchanged",
    ),
    "norms less one": (
        "llama",
        each("norm.weight", lambda w: w - 1),
        "layers.0.residual.mixer_norm",
        "weight of norm rmsnorm",
        "less one",
    ),
    "concatenation order": (
        MTP,
        each("eh_proj.weight", lambda w: w.roll(64, 1)),
        "predictor.depths.0.residual.mixer_norm",
        "inputs of eh_proj of predictor mtp",
        "[hidden; embedding]",
    ),
    "norms of the predictor": (
        MTP,
        swapped("enorm.weight", "hnorm.weight"),
        "predictor.depths.0.enorm",
        "enorm and hnorm of predictor mtp",
        "exchanged",
    ),
    # From here on no part states it.
    "transposed": (
        "llama",
        each("mixer.o.weight", lambda w: w.mT.contiguous()),
        "layers.0.mixer",
        "mixer.o.weight",
        "transposed",
    ),
    "scaling factor in the experts": (
        MLA,
        both(each("layers.1.ffn.down.weight", lambda w: w * 2.5)),
        "layers.1.ffn",
        "ffn.down.weight",
        "2.5 times as large, which is router.routed_scaling_factor",
    ),
    "scaled embeddings": (
        "llama",
        each("embedding.weight", lambda w: w * 32**0.5),
        "embedding",
        "embedding.weight",
        "5.65685 times as large, which is sqrt(hidden_size)",
    ),
    "scaled queries": (
        "llama",
        each("mixer.q.weight", lambda w: w * 8**-0.5),
        "layers.0.mixer",
        "mixer.q.weight",
        "0.353553 times as large, which is 1 / sqrt(mixer.head_dim)",
    ),
    "wrong sign": (
        "llama",
        each("mixer.v.weight", lambda w: -w),
        "layers.0.mixer",
        "mixer.v.weight",
        "-1 times as large",
    ),
    "order of experts": (
        "qwen3_moe",
        each("router.gate.weight", lambda w: w.roll(3, 0)),
        "layers.0.ffn.router",
        "router.gate.weight",
        "its outputs in another order, 5, 6, 7, 0, 1, 2, ...",
    ),
    "order of groups": (
        "qwen3_moe",
        each("ffn.up.weight", lambda w: w.flip(0)),
        "layers.0.ffn",
        "ffn.up.weight",
        "its groups in another order, 7, 6, 5, 4, 3, 2, ...",
    ),
    "routers' biases shifted": (
        MLA,
        each("router.bias", lambda b: torch.cat([b[4:], b[:4]])),
        "layers.1.ffn.router",
        "router.bias",
        "its features in another order, 4, 5, 6, 7, 0, 1, ...",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_tensors_stored_otherwise_are_found_with_their_component(lab: Any, case: str) -> None:
    family, edit, first, name, here = PLANTED[case]
    verdict = lab.verdict(family, {}, edit)
    assert verdict.first.where == first
    found = verdict.explanation
    assert found.complete, found.lines
    (step,) = found.steps
    (change,) = step.changes
    assert (change.name, change.here) == (name, here)
    assert change.source == "tensors"
    assert found.worst <= 1e-5
    assert f"{first} differs first" in found.lines[0]


# Two at once on the same tensors, which hide each other: the family, what was done, and one change for each tensor.
TOGETHER: dict[str, tuple[str, Edit, dict[str, str]]] = {
    "keys turned under the values' name": (
        "llama",
        both(
            each("mixer.k.weight", lambda w: per_head(w, 2, in_pairs)),
            swapped("mixer.k.weight", "mixer.v.weight"),
        ),
        {
            "keys and values of mixer gqa": "exchanged",
            "keys and values of mixer gqa, and rotary layout of mixer gqa": "exchanged, and interleaved",
        },
    ),
    "norms less one under each other's name": (
        "llama",
        both(
            each("mixer_norm.weight", lambda w: w - 1),
            each("ffn_norm.weight", lambda w: w - 1),
            swapped("mixer_norm.weight", "ffn_norm.weight"),
        ),
        {
            "weight of norm rmsnorm, and norms of the sublayers of residual pre-norm": "less one, and exchanged"
        },
    ),
    "heads apart and turned": (
        "mixtral",
        both(PAIRS, APART),
        {
            "order of query heads of mixer gqa, and rotary layout of mixer gqa": (
                "those of one key head apart, and interleaved"
            ),
            "order of query heads of mixer gqa": "those of one key head apart",
            "rotary layout of mixer gqa": "interleaved",
        },
    ),
    "turned and scaled": (
        "llama",
        both(PAIRS, each("mixer.q.weight", lambda w: w * 8**-0.5)),
        {
            "rotary layout of mixer gqa": "interleaved",
            "rotary layout of mixer gqa, and mixer.q.weight": (
                "interleaved, and 0.353553 times as large, which is 1 / sqrt(mixer.head_dim)"
            ),
        },
    ),
    "heads apart and transposed": (
        "qwen3",
        both(APART, each("mixer.o.weight", lambda w: w.mT.contiguous())),
        {
            "order of query heads of mixer gqa": "those of one key head apart",
            "order of query heads of mixer gqa, and mixer.o.weight": "those of one key head apart, and transposed",
        },
    ),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_two_conventions_of_one_tensor_are_found_together(lab: Any, case: str) -> None:
    family, edit, expected = TOGETHER[case]
    found = lab.verdict(family, {}, edit).explanation
    assert found.complete, found.lines
    changes = [change for step in found.steps for change in step.changes]
    assert {change.name: change.here for change in changes} == expected
