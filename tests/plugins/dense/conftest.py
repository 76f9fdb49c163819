"""One-layer models in float64 around the part under test, and streams to feed it."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composeformer.assemble import build
from composeformer.decoder import Model
from composeformer.model_cache import ModelCache
from composeformer.spec import Spec

HIDDEN = 12


class Lab:
    """Makes specs, models and inputs. `init_std` is large, lest attention be uniform and errors hide."""

    hidden = HIDDEN

    @staticmethod
    def spec(**tables: Any) -> Spec:
        data: dict[str, Any] = {
            "format": 1,
            "name": "lab",
            "model": {
                "vocab_size": 24,
                "hidden_size": HIDDEN,
                "max_position_embeddings": 4096,
                "init_std": 0.6,
            },
            "norm": {"kind": "rmsnorm"},
            "position": {"kind": "rope"},
            "mixer": {"kind": "gqa", "num_heads": 2},
            "ffn": {"kind": "swiglu", "intermediate_size": 20},
            "layers": [{}],
            "precision": {"kind": "full", "dtype": "float64"},
        }
        for name, table in tables.items():
            merged = isinstance(table, dict) and "kind" not in table and isinstance(data.get(name), dict)
            data[name] = {**data[name], **table} if merged else table
        return Spec.from_dict(data)

    def model(self, seed: int = 0, **tables: Any) -> Model:
        """A model whose norms and biases are no longer ones and zeros."""
        model = build(self.spec(**tables), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        return model

    @staticmethod
    def stream(rows: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)

    @staticmethod
    def mix(model: Model, x: Tensor, **batch: Any) -> Tensor:
        """The first layer's mixer over x as a model would call it; `cache` is the model's or the mixer's own."""
        cache = batch.pop("cache", None)
        whole = cache if isinstance(cache, ModelCache) else None
        if whole is not None:
            cache = whole.get("layers.0.mixer")
        positions = batch.pop("positions", None)
        if positions is None and cache is not None and whole is None:
            start = cache.lengths[:, None]
            positions = start + torch.arange(x.shape[1])
        ids = torch.zeros(x.shape[:2], dtype=torch.int64)
        mixer: Any = model.layers[0].mixer
        hidden: Tensor = mixer(x, model.batch(ids, positions, cache=whole, **batch), cache).hidden
        if whole is not None:
            whole.advance(ids, batch.get("documents"), batch.get("valid"))
        return hidden

    @staticmethod
    def gradients(
        model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The output, and the gradients of input and parameters for a cotangent, by default a ramp."""
        x = x.clone().requires_grad_()
        model.zero_grad()
        y = run(x)
        if cotangent is None:
            cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        y.backward(cotangent)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"output": y.detach(), "input": x.grad, **found}  # type: ignore[dict-item]


def assert_close(found: Any, wanted: Any, bound: float = 1e-12) -> None:
    """Relative error max|a - b| / max|b| within `bound`, for a tensor or for each of a mapping."""
    if isinstance(wanted, Mapping):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_close(found[name], wanted[name], bound)
        return
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    scale = wanted.abs().max() if wanted.numel() else torch.zeros(())
    assert (found - wanted).abs().max() <= bound * scale.clamp(min=1e-30)


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    return assert_close
