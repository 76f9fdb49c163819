"""One-layer models in float64 whose ffn is a mixture of experts, and streams to feed it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import composeformer as cf
from composeformer.tensors import Batch, Output

HIDDEN = 12
ROUTERS: dict[str, dict[str, Any]] = {
    "sigmoid-bias": {
        "kind": "sigmoid-bias",
        "top_k": 3,
        "num_groups": 4,
        "top_k_groups": 2,
        "routed_scaling_factor": 2.5,
        "sequence_balance_alpha": 0.3,
    },
    "softmax": {"kind": "softmax", "top_k": 2, "balance_alpha": 0.2, "z_alpha": 0.1},
    "softmax-groups": {
        "kind": "softmax",
        "top_k": 3,
        "normalize": False,
        "num_groups": 4,
        "top_k_groups": 2,
        "routed_scaling_factor": 16.0,
    },
}


class Lab:
    """Makes models of one layer, runs their ffn or router. `init_std` is large, lest experts be alike."""

    hidden = HIDDEN
    routers = ROUTERS

    @staticmethod
    def spec(router: Any = "sigmoid-bias", **tables: Any) -> cf.Spec:
        data: dict[str, Any] = {
            "format": 1,
            "model": {
                "vocab_size": 24,
                "hidden_size": HIDDEN,
                "max_position_embeddings": 4096,
                "init_std": 0.6,
            },
            "norm": {"kind": "rmsnorm"},
            "position": {"kind": "rope"},
            "mixer": {"kind": "gqa", "num_heads": 2},
            "ffn": {
                "kind": "moe",
                "num_experts": 8,
                "intermediate_size": 5,
                "num_shared_experts": 2,
                "router": ROUTERS[router] if isinstance(router, str) else router,
            },
            "layers": [{}],
            "precision": {"kind": "full", "dtype": "float64"},
        }
        for name, table in tables.items():
            merged = isinstance(table, dict) and "kind" not in table and isinstance(data.get(name), dict)
            data[name] = {**data[name], **table} if merged else table
        return cf.Spec.from_dict(data)

    @classmethod
    def model(cls, router: Any = "sigmoid-bias", seed: int = 0, **tables: Any) -> Any:
        """A model whose balancing biases are not zero."""
        model = cf.build(cls.spec(router, **tables), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for buffer in model.buffers():
            buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
        return model

    @classmethod
    def router(cls, table: Mapping[str, Any], num_experts: int, **tables: Any) -> Any:
        """A router whose logits are its input."""
        tables.setdefault("precision", {"kind": "full", "dtype": "float32"})
        model = {"hidden_size": num_experts, "vocab_size": 8, "max_position_embeddings": 4096}
        ffn = {"kind": "moe", "num_experts": num_experts, "intermediate_size": 4, "router": dict(table)}
        mixer = {"kind": "gqa", "num_heads": 1, "head_dim": 2}
        router = cf.build(cls.spec(model=model, mixer=mixer, ffn=ffn, **tables)).layers[0].ffn.router
        with torch.no_grad():
            router.gate.weight.copy_(torch.eye(num_experts))
        return router

    @staticmethod
    def stream(rows: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)

    @staticmethod
    def batch(x: Tensor, valid: Tensor | None = None, phase: Any = "train") -> Batch:
        ids = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        return Batch(ids, ids, valid=valid, phase=phase)

    @classmethod
    def run(cls, model: Any, x: Tensor, valid: Tensor | None = None, phase: Any = "train") -> Output:
        output: Output = model.layers[0].ffn(x, cls.batch(x, valid, phase))
        return output

    @classmethod
    def gradients(
        cls, model: Any, x: Tensor, valid: Tensor | None = None, cotangent: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The output, the losses, and the gradients of input and parameters for a cotangent, by default a ramp."""
        x = x.clone().requires_grad_()
        model.zero_grad()
        y, aux = cls.run(model, x, valid)
        if cotangent is None:
            cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        losses = sum(aux.losses.values(), torch.zeros((), dtype=torch.float64))
        ((y * cotangent).sum() + losses).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"output": y.detach(), "losses": losses.detach(), "input": x.grad, **found}  # type: ignore[dict-item]

    @staticmethod
    def close(found: Any, wanted: Any, bound: float = 1e-12) -> None:
        """Each tensor within `bound` of its largest value, or of one where all are smaller."""
        if isinstance(wanted, Mapping):
            assert found.keys() == wanted.keys()
            for name in wanted:
                Lab.close(found[name], wanted[name], bound)
            return
        assert found.shape == wanted.shape
        assert torch.isfinite(found).all()
        scale = wanted.abs().max().clamp(min=1) if wanted.numel() else torch.ones(())
        assert not found.numel() or (found - wanted).abs().max() <= bound * scale


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()
