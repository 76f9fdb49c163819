"""One-layer models in float64 around latent attention, and streams to feed it.

Where the plugin's entry point is not installed, as in a fresh checkout, a distribution that has it stands on
the path for the test run.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import composeformer as cf
from composeformer.model_cache import ModelCache

HIDDEN = 12
PLUGIN = Path(__file__).resolve().parents[3] / "plugins" / "attention_mla"


@pytest.fixture(scope="session", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if entry_points(group="composeformer", name="attention_mla"):
        yield
        return
    from composeformer.plugins import configure

    folder = tmp_path_factory.mktemp("attention_mla")
    info = folder / "attention_mla_checkout-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: attention-mla-checkout\nVersion: 1.0\n")
    points = "[composeformer]\nattention_mla = composeformer_attention_mla.plugin\n"
    (info / "entry_points.txt").write_text(points)
    added = [str(folder), str(PLUGIN)]
    sys.path[:0] = added
    configure()
    yield
    for each in added:
        sys.path.remove(each)
    configure()


class Lab:
    """Makes specs, models and inputs. `init_std` is large, lest attention be uniform and errors hide."""

    hidden = HIDDEN
    # No two widths alike and none a multiple of anything, so that one taken for another is an error.
    mixer: Mapping[str, Any] = {
        "kind": "mla",
        "num_heads": 2,
        "q_lora_rank": 9,
        "kv_lora_rank": 7,
        "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 4,
        "v_head_dim": 3,
    }

    @classmethod
    def spec(cls, **tables: Any) -> cf.Spec:
        """A spec of one layer. In `mixer` None takes a field away; a table without `kind` adds to ours."""
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
            "position": {"kind": "rope", "layout": "interleaved"},
            "mixer": dict(cls.mixer),
            "ffn": {"kind": "swiglu", "intermediate_size": 20},
            "layers": [{}],
            "precision": {"kind": "full", "dtype": "float64"},
        }
        for name, table in tables.items():
            merged = isinstance(table, dict) and "kind" not in table and isinstance(data.get(name), dict)
            data[name] = {**data[name], **table} if merged else table
        data["mixer"] = {key: value for key, value in data["mixer"].items() if value is not None}
        return cf.Spec.from_dict(data)

    @classmethod
    def model(cls, seed: int = 0, **tables: Any) -> Any:
        """A model whose norms and biases are no longer ones and zeros."""
        model = cf.build(cls.spec(**tables), seed=seed)
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
    def mix(model: Any, x: Tensor, **batch: Any) -> Tensor:
        """The first layer's mixer over x as a model would call it; `cache` is the model's or the mixer's own."""
        cache = batch.pop("cache", None)
        whole = cache if isinstance(cache, ModelCache) else None
        if whole is not None:
            cache = whole.get("layers.0.mixer")
        positions = batch.pop("positions", None)
        if positions is None and cache is not None and whole is None:
            positions = cache.lengths[:, None] + torch.arange(x.shape[1])
        if cache is not None:
            batch.setdefault("phase", "decode" if x.shape[1] == 1 else "prefill")
        ids = torch.zeros(x.shape[:2], dtype=torch.int64)
        hidden: Tensor = (
            model.layers[0].mixer(x, model.batch(ids, positions, cache=whole, **batch), cache).hidden
        )
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


def assert_gradients_close(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], bound: float = 1e-12
) -> None:
    """Each within `bound` of the largest: unlike an output, a gradient may be zero but for rounding."""
    assert found.keys() == wanted.keys()
    scale = max(each.abs().max() for each in wanted.values())
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        assert (found[name] - wanted[name]).abs().max() <= bound * scale, name


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    return assert_close


@pytest.fixture(scope="session")
def gradients_close() -> Callable[..., None]:
    return assert_gradients_close
