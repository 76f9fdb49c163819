"""Every precision with mixers, ffns and predictors: a step, a cache, drafts; as near to full precision as declared."""

from functools import cache
from itertools import product
from math import sqrt
from typing import Any

import pytest
import torch

import composeformer as cf
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.generation import generate
from composeformer.plugins import current
from composeformer.spec import Spec
from composeformer.train import TokenBatch, train_step, trained, trainer

# What a product's rounding makes of it, relative, in the root mean square: E4M3 of two operands; bfloat16 of two; an
# integer's, 1 / sqrt(12) of a step of 1 / 127 of the row's largest, which is below four times its mean square's root.
E4M3, BF16, INT8 = 0.038, 2**-8, 4 / 127 / sqrt(12)
FP8_STORED = {"kind": "fp8-block", "weights": "float8_e4m3fn"}
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({"kind": "full"}, 0.0),
    "full-bfloat16": ({"kind": "full", "dtype": "bfloat16"}, BF16),
    "bf16": ({"kind": "bf16"}, BF16),
    "fp8-block": ({"kind": "fp8-block"}, E4M3),
    "fp8-block-options": (
        {"kind": "fp8-block", "scales": "ue8m0", "gradients": "e5m2", "weights": "bfloat16"},
        E4M3,
    ),
    "fp8-block-stored": (FP8_STORED, E4M3),
    "fp8-tensor": ({"kind": "fp8-tensor"}, E4M3),
    "mxfp8": ({"kind": "mxfp8"}, E4M3),
    "int8": ({"kind": "int8"}, INT8),
    "rules": (
        {
            "kind": "bf16",
            "rules": [
                {"roles": "*.mixer.o", "format": "full"},
                {"roles": "*.mixer", "format": "fp8-block"},
                {"roles": "*norm*", "format": {"kind": "full", "dtype": "bfloat16"}},
                {"roles": "layers.*.ffn", "format": "mxfp8"},
                {"roles": "head", "format": "fp8-tensor"},
                {"roles": "embedding", "format": {"kind": "full", "dtype": "bfloat16"}},
            ],
        },
        E4M3,
    ),
    "rules-stored": (
        {
            "kind": "full",
            "rules": [{"roles": "*.mixer", "format": FP8_STORED}, {"roles": "*.down", "format": "int8"}],
        },
        E4M3,
    ),
}
MIXERS: dict[str, dict[str, Any]] = {
    "gqa": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "window": 9},
    "mla": {
        "kind": "mla",
        "num_heads": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
    },
}
# All experts are chosen, so that no choice turns on a rounding.
ROUTER = {"kind": "sigmoid-bias", "top_k": 4}
FFNS: dict[str, dict[str, Any]] = {
    "swiglu": {"kind": "swiglu", "intermediate_size": 40},
    "moe": {"kind": "moe", "num_experts": 4, "num_shared_experts": 1, "intermediate_size": 24, "router": ROUTER},
}
PREDICTORS: dict[str, dict[str, Any] | None] = {"alone": None, "mtp": {"kind": "mtp", "depth": 2}}
CELLS = list(product(PRECISIONS, MIXERS, FFNS, PREDICTORS))
# Products on the way to a logit: two layers of at most five in a mixer and three in an ffn, and the head.
PRODUCTS = 17
IDS = torch.arange(2 * 20).view(2, 20) * 7 % 60


def spec(precision: str, mixer: str, ffn: str, predictor: str) -> Spec:
    data: dict[str, Any] = {
        "model": {
            "vocab_size": 60,
            "hidden_size": 48,
            "max_position_embeddings": 64,
            "tie_embeddings": ffn == "moe",
            "init_std": 0.1,
        },
        "norm": {"kind": "rmsnorm"},
        "position": {"kind": "rope"},
        "mixer": MIXERS[mixer],
        "ffn": FFNS[ffn],
        "layers": [{"repeat": 2}],
        "precision": PRECISIONS[precision][0],
    }
    if PREDICTORS[predictor] is not None:
        data["predictor"] = PREDICTORS[predictor]
    return Spec.from_dict(data)


@cache
def full(*cell: str) -> Model:
    """The judge of all that differ in precision alone."""
    model: Model = cf.build(spec("full", *cell), seed=1)
    return model


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_combination_trains_and_decodes_as_its_precision_declares(cell: tuple[str, ...]) -> None:
    model = cf.build(spec(*cell), seed=1)
    exact = full(*cell[1:])
    # Roundings are independent, so that their squares add up; residual sums make none of them larger.
    error = sqrt(PRODUCTS) * (PRECISIONS[cell[0]][1] + BF16 if cell[0] != "full" else 1e-6)
    with torch.no_grad():
        expected = exact(IDS, predict=False).logits
        whole = model(IDS, predict=False).logits
    assert whole.dtype == torch.bfloat16 or cell[0] != "full-bfloat16"
    assert_near(whole, expected, error)
    assert_near(decoded(model), expected, error)
    (row,) = generate(model, IDS[0, :7].tolist(), max_new_tokens=6, speculate=model.predictor is not None)
    made = torch.tensor(row.ids)
    with torch.no_grad():
        logits = exact(torch.cat([IDS[0, :7], made])[None], predict=False).logits[0, 6:-1]
    # Each token made is the best but for errors of two logits, whose maximum over a few dozens is below four times
    # the root mean square.
    lost = logits.amax(-1) - logits.gather(1, made[:, None])[:, 0]
    assert float(lost.max()) <= 2 * 4 * error * float(logits.square().mean().sqrt())
    if model.spec.formats.coded:
        with pytest.raises(SpecError, match="stored as codes, which do not train"):
            trainer(model)
    else:
        assert_learns(model)


def assert_near(found: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    assert found.isfinite().all()
    assert float((found.double() - expected.double()).norm()) <= error * float(expected.double().norm())


def decoded(model: Model) -> torch.Tensor:
    """Logits of a prompt, of a piece, and of single tokens."""
    cache = model.new_cache(2, IDS.shape[1])
    pieces = [IDS[:, :9], IDS[:, 9:13], *IDS[:, 13:].split(1, 1)]
    with torch.no_grad():
        return torch.cat([model(piece, cache=cache).logits for piece in pieces], 1)


def assert_learns(model: Model) -> None:
    """Two micro-batches make one step, in which every parameter has a gradient in its format and moves."""
    objective, optimizer = trainer(model, model.spec.with_({"train.learning_rate": 0.01}))
    parameters = trained(model)
    before = [one.parameter.detach().clone() for one in parameters]
    result = train_step(model, [TokenBatch(IDS[:1]), TokenBatch(IDS[1:])], objective, optimizer, step=0)
    assert result.skipped is None
    for one, value in zip(parameters, before, strict=True):
        assert one.format is not None
        assert str(one.parameter.dtype) == f"torch.{one.format.storage}", one.name
        assert one.parameter.grad is not None, one.name
        assert str(one.parameter.grad.dtype) == f"torch.{one.format.gradient}", one.name
        assert str(optimizer.state[one.parameter]["exp_avg"].dtype) == f"torch.{one.format.moment}", one.name
        assert one.parameter.grad.any(), one.name
        assert not torch.equal(one.parameter, value), one.name


def test_the_axis_has_every_precision_that_is_registered() -> None:
    assert {table["kind"] for table, _ in PRECISIONS.values()} == set(current().registry.kinds("precision"))
