"""A cast of a model keeps the dtypes that parts fix: no part has to see to it."""

from typing import Any

import pytest
import torch

from composeformer.assemble import build
from composeformer.decoder import Model


def plain_router_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router that keeps its own bias is made an ordinary module."""
    from composeformer_moe.sigmoid_bias import SigmoidBiasRouter

    monkeypatch.delattr(SigmoidBiasRouter, "_apply")


@pytest.mark.parametrize("name", ["to", "half", "double"])
def test_what_is_declared_in_a_dtype_of_its_own_keeps_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_router_casts(monkeypatch)
    model: Any = build("tiny-deepseek-v3")
    fixed = {each for each, weight in model.spec.plan.tensors.items() if weight.dtype == "float32"}
    assert fixed
    for each in fixed:
        model.get_buffer(each).normal_(2.0, 1.0, generator=torch.Generator().manual_seed(0))
    before = {each: value.clone() for each, value in model.state_dict().items()}
    dtype = {"to": torch.bfloat16, "half": torch.float16, "double": torch.float64}[name]
    cast: Model = model.to(dtype) if name == "to" else getattr(model, name)()
    for each, value in cast.state_dict().items():
        assert value.dtype == (torch.float32 if each in fixed else dtype)
        assert each not in fixed or torch.equal(value, before[each])
    assert cast is model
    assert cast.get_parameter("embedding.weight").requires_grad
