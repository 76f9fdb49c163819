"""Costs stated without torch are what is built, cached and counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.assemble import build
from composeformer.costs import cost
from composeformer.errors import InputError, PluginError
from composeformer.spec import Spec


@st.composite
def dense(draw: st.DrawFn) -> dict[str, int]:
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    return {
        "vocab": draw(st.integers(1, 10**6)),
        "layers": draw(st.integers(1, 100)),
        "heads": heads,
        "kv": draw(st.sampled_from([n for n in (1, 2, 4, 8) if heads % n == 0])),
        "head": 2 * draw(st.integers(1, 128)),
        "hidden": draw(st.integers(1, 10**5)),
        "inner": draw(st.integers(1, 10**5)),
        "tied": draw(st.integers(0, 1)),
        "bias": draw(st.integers(0, 1)),
    }


@settings(deadline=None, max_examples=60)
@given(dense(), st.integers(1, 10**6))
def test_counts_are_the_closed_form(n: dict[str, int], context: int) -> None:
    mixer = {
        "num_heads": n["heads"],
        "num_kv_heads": n["kv"],
        "head_dim": n["head"],
        "qkv_bias": bool(n["bias"]),
    }
    found = Spec.from_dict(
        {
            "model": {
                "vocab_size": n["vocab"],
                "hidden_size": n["hidden"],
                "max_position_embeddings": 8,
                "tie_embeddings": bool(n["tied"]),
            },
            "norm": {"kind": "rmsnorm"},
            "position": {"kind": "rope"},
            "mixer": {"kind": "gqa", **mixer},
            "ffn": {"kind": "swiglu", "intermediate_size": n["inner"]},
            "layers": [{"repeat": n["layers"]}],
        }
    )
    d, width, kv = n["hidden"], n["heads"] * n["head"], n["kv"] * n["head"]
    matrices = n["layers"] * (2 * d * width + 2 * d * kv + 3 * d * n["inner"])
    small = n["layers"] * (2 * d + n["bias"] * (width + 2 * kv)) + d
    table = n["vocab"] * d
    counts = cost(found, context=context)
    assert counts.total == matrices + small + table * (2 - n["tied"])
    assert counts.active.with_embeddings == counts.total
    assert counts.active.without_input_embedding == matrices + small + table
    assert counts.active.without_embeddings == matrices + small
    assert counts.cache_bytes_per_token == n["layers"] * 2 * kv * 2
    assert sum(counts.by_slot.values()) == counts.total
    core = n["layers"] * 4 * width * context
    assert counts.flops_per_token.forward == 2 * (matrices + table) + core / 2
    assert counts.flops_per_token.training == 3 * counts.flops_per_token.forward
    assert cost(found, context=context, causal=False).flops_per_token.forward == 2 * (matrices + table) + core


@pytest.mark.parametrize("context", [0, -1])
def test_a_context_without_tokens_is_refused(context: int) -> None:
    with pytest.raises(InputError, match="context = "):
        cost("tiny-llama", context=context)


def test_the_context_is_the_models_longest_at_most() -> None:
    assert cost("tiny-llama").flops_per_token.context == 512
    assert cost("llama-3.1-8b").flops_per_token.context == 4096
    assert cost("tiny-llama", context=9).flops_per_token.context == 9


def test_the_document_is_that_of_the_command() -> None:
    document = cost("smollm2-135m").to_dict()
    assert list(document)[:3] == ["name", "fingerprint", "parameters"]
    assert document["unverified"] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", None])
def test_a_cache_is_told_as_it_is_allocated(dtype: str | None) -> None:
    """In the dtype that the policy states; at two bytes an element where none does."""
    spec = Spec.load("tiny-deepseek-v3").with_(precision={"kind": "full", "dtype": dtype or "bfloat16"})
    allocated = build(spec, device="meta").new_cache(3, 64).num_bytes
    plain = Spec.load("tiny-deepseek-v3")
    counts = cost(plain if dtype is None else spec, context=64)
    assert 3 * counts.cache_bytes_at_context == 3 * 64 * counts.cache_bytes_per_token == allocated


def test_windows_hold_no_more_than_their_width_at_a_context() -> None:
    per_token = 3 * 2 * 2 * 16 * 2  # layers, keys and values, heads, width, bytes
    full = cost("tiny-llama", context=512)
    assert (full.cache_bytes_per_token, full.cache_bytes_at_context) == (per_token, 512 * per_token)
    narrow = cost(Spec.load("tiny-llama", ["mixer.attention.window=64"]), context=512)
    assert (narrow.cache_bytes_per_token, narrow.cache_bytes_at_context) == (per_token, 64 * per_token)


def test_a_cost_that_is_none_is_told_with_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec.load("tiny-llama")
    monkeypatch.setattr(type(spec.layers[0].ffn.config), "cost", lambda *_: [5])  # type: ignore[union-attr]
    with pytest.raises(PluginError, match=r"plugin dense .*: ffn swiglu at layers.0.ffn: cost yields a int"):
        cost(spec)
