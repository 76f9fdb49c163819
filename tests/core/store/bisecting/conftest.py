"""Trusted folders that transformers wrote, every tensor random, and folders of ours with planted mistakes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import composeformer as cf
from composeformer.assemble import fill, skeleton
from composeformer.decoder import Model
from composeformer.spec import Spec
from composeformer.store import Verdict, save, verify
from composeformer.store.loading import open_any

SHARED: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "biased": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mixtral": ("Mixtral", {"sliding_window": 12, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
    ),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
}
MTP = "deepseek_v3+mtp"

Tensors = Mapping[str, Tensor]
Edit = Callable[[dict[str, Tensor]], Tensors]


def nothing(state: dict[str, Tensor]) -> Tensors:
    return {}


def randomised(state: Mapping[str, Tensor]) -> None:
    """Fills tensors in place: matrices keep the size of what passes, norms are near one, biases far from zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in state.items():
            noise = torch.randn(tensor.shape, generator=generator)
            middle = 1.0 if "norm" in name else 0.0
            tensor.copy_(noise * 0.3 + middle if tensor.ndim == 1 else noise * tensor.shape[-1] ** -0.5)


def written(family: str, root: Path) -> Path:
    """A Hugging Face folder of the family."""
    import transformers

    if family == MTP:
        layers = [{"mixer": "mla", "ffn": "dense"}, {"mixer": "mla", "ffn": "experts"}]
        model = cf.build(Spec.load("tiny-deepseek-v3").with_({"model.vocab_size": 67}, layers=layers))
        randomised(model.state_dict())
        save(model, root / "ours")
        cf.export_model(root / "ours", root / "theirs")
        return root / "theirs"
    prefix, more = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**(SHARED | more))
    theirs = getattr(transformers, f"{prefix}ForCausalLM")(config)
    randomised(theirs.state_dict())
    theirs.save_pretrained(root / "theirs")
    return root / "theirs"


class Lab:
    """Trusted models by family, and what a comparison says of copies with a mistake."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[str, Path] = {}
        self.count = 0

    def folder(self, family: str) -> Path:
        """The trusted folder."""
        if family not in self.folders:
            self.folders[family] = written(family, self.root / family)
        return self.folders[family]

    def trusted(self, family: str) -> Model:
        return open_any(self.folder(family))

    def planted(
        self, family: str, changes: Mapping[str, Any], edit: Edit = nothing, dtype: str | None = None
    ) -> Path:
        """A model folder of ours: the trusted one, with another spec and other tensors. A change to None takes away."""
        trusted = self.trusted(family)
        data = trusted.spec.to_dict()
        for path, value in changes.items():
            *above, last = path.split(".")
            held = data
            for step in above:
                held = held[int(step)] if isinstance(held, list) else held[step]  # type: ignore[assignment]
            if value is None:
                del held[last]
            else:
                held[last] = value
        model = skeleton(Spec.from_dict(data), dtype=dtype)
        state = {name: tensor.clone() for name, tensor in trusted.state_dict().items()}
        state |= edit(state)
        fill(model, [(name, state[name]) for name in model.spec.plan.tensors], "cpu")
        self.count += 1
        save(model, self.root / f"planted-{self.count}")
        return self.root / f"planted-{self.count}"

    def verdict(
        self,
        family: str,
        changes: Mapping[str, Any],
        edit: Edit = nothing,
        tolerance: float = 1e-5,
        tokens: int = 48,
    ) -> Verdict:
        """What verify says of the planted folder."""
        ours = open_any(self.planted(family, changes, edit))
        return verify(ours, self.trusted(family), tokens=tokens, tolerance=tolerance, bisect=True)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("bisect"))
