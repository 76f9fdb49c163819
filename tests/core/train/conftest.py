"""A tiny tied model in float64, one of whose ffns counts, and batches with padding and packed documents."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from composeformer.assemble import build
from composeformer.decoder import Model
from composeformer.spec import Spec
from composeformer.tensors import Aux, Batch, Output
from composeformer.train import Run, TokenBatch

VOCAB = 19
SPEC: dict[str, Any] = {
    "model": {
        "vocab_size": VOCAB,
        "hidden_size": 12,
        "max_position_embeddings": 64,
        "init_std": 0.3,
        "tie_embeddings": True,
    },
    "norm": {"kind": "rmsnorm"},
    "position": {"kind": "rope"},
    "mixer": {"kind": "gqa", "num_heads": 2, "qkv_bias": True},
    "ffn": {"kind": "swiglu", "intermediate_size": 16},
    "layers": [{"repeat": 2}],
    "precision": {"kind": "full", "dtype": "float64"},
}


def counting(model: Model) -> list[tuple[dict[str, Tensor], Run, bool]]:
    """Makes the first layer's ffn count tokens by id and add a side loss; returns its `after_step` calls."""
    ffn: Any = model.layers[0].ffn
    calls: list[tuple[dict[str, Tensor], Run, bool]] = []

    class Counting(type(ffn)):  # type: ignore[misc]
        def forward(self, x: Tensor, batch: Batch) -> Output:
            output: Output = super().forward(x, batch)
            real = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
            size = (output.hidden.square().mean(-1) * real).sum()
            load = torch.bincount(batch.ids[real], minlength=VOCAB)
            metric = (size.detach(), real.sum())
            path = "layers.0.ffn"
            return Output(
                output.hidden,
                Aux({f"{path}.size": size}, {f"{path}.load": load}, {f"{path}.mean_size": metric}),
            )

        def after_step(self, totals: Mapping[str, Tensor], run: Run) -> None:
            calls.append((dict(totals), run, torch.is_grad_enabled()))

    ffn.__class__ = Counting
    return calls


def rows(count: int, length: int, seed: int) -> TokenBatch:
    """Random rows: left or right padding, up to three packed documents in each."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (count, length), generator=random)
    pads = torch.randint(0, length, (count, 1), generator=random)
    place = torch.arange(length)
    valid = torch.where(torch.arange(count)[:, None] % 2 == 0, place >= pads, place < length - pads)
    documents = (place > torch.randint(0, length, (count, 2, 1), generator=random)).sum(1)
    return TokenBatch(ids, valid, documents)


def gradients(model: Model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def fresh() -> Callable[[], Model]:
    """Makes equal models."""
    return lambda: build(Spec.from_dict(SPEC), seed=5)
