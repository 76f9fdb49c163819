"""What drafting keeps; what it says is in the laws of predictors."""

from composeformer.assemble import build
from composeformer.spec import Spec

LATENT = {
    "kind": "mla",
    "num_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}


def test_caches_hold_what_the_layer_s_mixers_cache_and_no_more() -> None:
    spec = {
        "model": {"vocab_size": 29, "hidden_size": 16, "max_position_embeddings": 64},
        "norm": {"kind": "rmsnorm"},
        "position": {"kind": "rope"},
        "mixer": LATENT,
        "ffn": {"kind": "swiglu", "intermediate_size": 24},
        "layers": [{}],
        "predictor": {"kind": "mtp", "depth": 3},
    }
    drafting = build(Spec.from_dict(spec), dtype="float64").predictor.new_cache(2, 10)
    assert drafting.num_bytes == 2 * (8 + 4) * 8 * (10 + 11 + 12)
