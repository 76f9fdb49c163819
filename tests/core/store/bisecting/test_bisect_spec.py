"""Each convention that a spec tells, planted wrongly in turn: the search names it, the component, and both values."""

from typing import Any

import pytest

GQA = {"mixer.qkv_bias": False, "mixer.o_bias": False}
ROPE = {"kind": "rope", "theta": 1000.0, "layout": "interleaved"}

# Family, what the wrong folder says, the component that differs first, and the names of the changes that explain it.
PLANTED: dict[str, tuple[str, dict[str, Any], str, set[str]]] = {
    "rotary layout": ("llama", {"position.layout": "interleaved"}, "layers.0.mixer", {"position.layout"}),
    "rotary layout of latent attention": (
        "deepseek_v3",
        {"position.layout": "half-split"},
        "layers.0.mixer",
        {"position.layout"},
    ),
    "theta": ("qwen3", {"position.theta": 1e6}, "layers.0.mixer", {"position.theta"}),
    "part of a head turns": ("llama", {"position.fraction": 0.5}, "layers.0.mixer", {"position.fraction"}),
    "positions divided": (
        "llama",
        {"position": {"kind": "linear", "factor": 2.0}},
        "layers.0.mixer",
        {"mixer.position"},
    ),
    "no extension": ("deepseek_v3", {"position": ROPE}, "layers.0.mixer", {"mixer.position"}),
    "mscale of the scores": (
        "deepseek_v3",
        {"position.mscale_all_dim": None},
        "layers.0.mixer",
        {"position.mscale_all_dim"},
    ),
    "mscale of the tables": ("deepseek_v3", {"position.mscale": 1.0}, "layers.0.mixer", {"position.mscale"}),
    "factor": ("deepseek_v3", {"position.factor": 8.0}, "layers.0.mixer", {"position.factor"}),
    "blend": ("deepseek_v3+mtp", {"position.beta_slow": 4.0}, "layers.0.mixer", {"position.beta_slow"}),
    "eps": ("llama", {"norm.eps": 1e-5}, "layers.0.residual.mixer_norm", {"norm.eps"}),
    "eps of the latents": (
        "deepseek_v3",
        {"mixer.norm": {"kind": "rmsnorm", "eps": 1e-3}},
        "layers.0.mixer.q_a_norm",
        {"norm.eps"},
    ),
    "kind of norm": (
        "llama",
        {"norm": {"kind": "layernorm", "eps": 1e-6, "bias": False}},
        "layers.0.residual.mixer_norm",
        {"residual.norm"},
    ),
    "queries and keys not normalised": (
        "qwen3",
        {"mixer.qk_norm": None},
        "layers.0.mixer.q_norm",
        {"mixer.qk_norm"},
    ),
    "no biases": ("biased", GQA, "layers.0.mixer", {"mixer.qkv_bias", "mixer.o_bias"}),
    "window off by one": ("mixtral", {"mixer.window": 13}, "layers.0.mixer", {"mixer.window"}),
    "no window": ("mixtral", {"mixer.window": None}, "layers.0.mixer", {"mixer.window"}),
    "cap of scores": ("llama", {"mixer.cap": 3.0}, "layers.0.mixer", {"mixer.cap"}),
    "activation": ("llama", {"ffn.activation": "gelu"}, "layers.0.ffn", {"ffn.activation"}),
    "form of gelu": ("llama", {"ffn.activation": "gelu_tanh"}, "layers.0.ffn", {"ffn.activation"}),
    "scale of embeddings": ("llama", {"embedding.scale": 32**0.5}, "embedding", {"embedding.scale"}),
    "scale of logits": ("llama", {"head.scale": 0.5}, "logits", {"head.scale"}),
    "cap of logits": ("llama", {"head.cap": 5.0}, "logits", {"head.cap"}),
    "tied": ("llama", {"model.tie_embeddings": True}, "logits", {"model.tie_embeddings"}),
    "normalised weights": (
        "qwen3_moe",
        {"router.normalize": True},
        "layers.0.ffn.router",
        {"router.normalize"},
    ),
    "weights before the choice": (
        "mixtral",
        {"router.normalize": False, "router.softmax": "before"},
        "layers.0.ffn.router",
        {"router.normalize"},
    ),
    "normalisation of sigmoids": (
        "deepseek_v3",
        {"router.normalize": False},
        "layers.1.ffn.router",
        {"router.normalize"},
    ),
    "scaling factor": (
        "deepseek_v3",
        {"router.routed_scaling_factor": 1.0},
        "layers.1.ffn.router",
        {"router.routed_scaling_factor"},
    ),
    "group score": (
        "deepseek_v3",
        {"router.group_score": "max"},
        "layers.1.ffn.router",
        {"router.group_score"},
    ),
    "groups": (
        "deepseek_v3",
        {"router.num_groups": 1, "router.top_k_groups": 1},
        "layers.1.ffn.router",
        {"router.num_groups", "router.top_k_groups"},
    ),
    "experts a token": ("qwen3_moe", {"router.top_k": 2}, "layers.0.ffn.router", {"router.top_k"}),
    "kind of router": (
        "deepseek_v3",
        {"router": {"kind": "softmax", "top_k": 2, "num_groups": 4, "top_k_groups": 2}},
        "layers.1.ffn.router",
        {"ffn.router"},
    ),
    "one layer alone": (
        "llama",
        {"layers": [{}, {"ffn": {"use": "ffn", "activation": "relu"}}]},
        "layers.1.ffn",
        {"ffn.activation"},
    ),
    "depths of the predictor": (
        "deepseek_v3+mtp",
        {"predictor": None},
        "predictor.depths.0.enorm",
        {"predictor"},
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_wrong_value_is_found_with_its_component(lab: Any, case: str) -> None:
    family, changes, first, names = PLANTED[case]
    verdict = lab.verdict(family, changes)
    assert verdict.first.where == first
    found = verdict.explanation
    assert found.complete, found.lines
    assert {change.name for step in found.steps for change in step.changes} == names
    assert {change.source for step in found.steps for change in step.changes} == {"spec"}
    assert found.steps[0].first.where == first
    # The variant has the trusted model's function and tensors.
    assert found.worst == 0.0
    told = " ".join(found.lines)
    assert f"{first} differs first" in told
    assert all(f"explained by {name}: " in told or f"; and {name}: " in told for name in names)
