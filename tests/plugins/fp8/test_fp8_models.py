"""Scaled policies inside models: latent attention absorbed and expanded, tied embeddings, rules, formats."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import composeformer as cf
from composeformer import lazy
from composeformer.tensors import Batch
from composeformer_fp8.configs.scaled import FP8Block
from composeformer_fp8.linear import Scaled
from composeformer_fp8.numbers import E4M3
from composeformer_fp8.plain import High
from composeformer_fp8.testing import magnitude

HIDDEN, LATENT, HEADS = 160, 144, 3
RECIPE = FP8Block().recipe
BF16 = 2.0**-8


def spec(precision: Any, tied: bool = False) -> cf.Spec:
    """One layer of latent attention whose widths are no multiples of 128."""
    return cf.Spec.from_dict(
        {
            "format": 1,
            "model": {
                "vocab_size": 50,
                "hidden_size": HIDDEN,
                "max_position_embeddings": 64,
                "tie_embeddings": tied,
                "init_std": 0.1,
            },
            "norm": {"kind": "rmsnorm"},
            "position": {"kind": "rope"},
            "mixer": {
                "kind": "mla",
                "num_heads": HEADS,
                "q_lora_rank": 136,
                "kv_lora_rank": LATENT,
                "qk_nope_head_dim": 40,
                "qk_rope_head_dim": 8,
                "v_head_dim": 40,
            },
            "ffn": {"kind": "swiglu", "intermediate_size": 200},
            "layers": [{}],
            "precision": precision,
        }
    )


def implementations(name: str) -> type[nn.Module]:
    """Latent attention's class of that name, as the registry knows it."""
    component = spec({"kind": "full"}).registry.get("mixer", "mla")
    (found,) = (each for each in component.implementations if each.name == name)
    cls: type[nn.Module] = lazy.load(found.module)
    return cls


def attended(model: nn.Module, name: str, latent: Tensor, queries: Tensor) -> Tensor:
    """What one implementation's attention core makes of given latents and queries."""
    mixer: Any = model.layers[0].mixer  # type: ignore[union-attr, index]
    nope, rope = queries.split([mixer.nope, mixer.rope], -1)
    key = torch.ones(*latent.shape[:2], mixer.rope)
    return implementations(name).attend(mixer, nope, rope, latent, key, None)  # type: ignore[operator, no-any-return]


IMPLEMENTATIONS = ("reference", "expanded", "absorbed")


@pytest.mark.parametrize("policy", [{"kind": "fp8-block"}, {"kind": "fp8-block", "weights": "float8_e4m3fn"}])
def test_absorbed_attention_multiplies_by_the_very_weight_of_the_expanded(policy: dict[str, Any]) -> None:
    """Latents of signs alone are quantised exactly, so that all that is left between the two is rounding to bfloat16;
    the master, or the codes without their scales, are several times as far away.
    """
    model = cf.build(spec(policy), seed=0)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 9, LATENT, generator=generator).sign()
    queries = torch.randn(2, 9, HEADS, 48, generator=generator)
    with torch.no_grad():
        found = {name: attended(model, name, latent, queries).double() for name in IMPLEMENTATIONS}
        kv_b = model.layers[0].mixer.kv_b  # type: ignore[union-attr, index]
        other = kv_b.weight.float()
        kv_b.matrix = lambda: other
        wrong = attended(model, "absorbed", latent, queries).double()
    size = found["reference"].norm()
    # Keys and values are rounded to bfloat16 once where they are written out, and never where they are absorbed: each
    # error is below half of 2^-8, that of scores moves weights by less than a value's own size.
    for name in ("expanded", "absorbed"):
        assert (found[name] - found["reference"]).norm() <= 2 * BF16 * size
    assert (wrong - found["reference"]).norm() > 3 * BF16 * size


@pytest.mark.parametrize("name", ["fp8-block", "fp8-tensor", "mxfp8"])
@pytest.mark.parametrize("phase", ["expanded", "absorbed"])
def test_latent_attention_is_the_full_precision_one_within_the_declared_error(name: str, phase: str) -> None:
    """Five products follow one another or add up, each with the declared typical error; the sum of them all bounds
    what they make together, for softmax and norms enlarge no relative error of scores below 1.
    """
    full, scaled = (cf.build(spec({"kind": kind}), seed=0) for kind in ("full", name))
    x = torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(2, 12, dtype=torch.int64)
    found = []
    for model, kind in ((full, "reference"), (scaled, phase)):
        mixer: Any = model.layers[0].mixer  # type: ignore[union-attr, index]
        tables = {mixer.position.key: mixer.position(torch.arange(12).expand(2, 12))}
        batch = Batch(ids, torch.arange(12).expand(2, 12), tables=tables)
        inputs = x.clone().requires_grad_()
        dtype = torch.float32 if model is full else torch.bfloat16
        view = object.__new__(implementations(kind))
        view.__dict__ = mixer.__dict__
        y = implementations(kind).forward(view, inputs.to(dtype), batch).hidden
        y.float().square().sum().backward()
        found.append((y.detach().double(), inputs.grad, mixer.kv_b.weight.grad))
    one = cf.Spec.load(scaled.spec).single("precision").config.recipe.typical_error()
    for (full_y, scaled_y), products in zip(zip(*found, strict=True), (5, 11, 11), strict=True):
        assert full_y is not None
        assert scaled_y is not None
        error = (scaled_y.double() - full_y.double()).norm() / full_y.double().norm()
        assert error <= products * (one + BF16)
        assert error > one / 2  # it is that format, and not full precision


def logits(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Of some tokens, with the hidden states they are made of."""
    out = model(torch.arange(24).view(2, 12))
    return out.logits, out.hidden


def test_tied_head_stays_high_and_shares_one_parameter() -> None:
    model = cf.build(spec({"kind": "fp8-block"}, tied=True), seed=0)
    found, hidden = logits(model)
    weight = model.embedding.weight
    assert isinstance(head_map(model), High)
    assert found.dtype == torch.float32
    exact = hidden.double() @ weight.double().mT
    assert ((found - exact).abs() <= HIDDEN * 2.0**-24 * (hidden.double().abs() @ weight.double().abs().mT)).all()
    found.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def head_map(model: nn.Module) -> nn.Module:
    """The head's one linear map."""
    (found,) = (each for each in model.head.modules() if isinstance(each, Scaled | High))  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("implementation", ["reference", "fast"])
def test_rule_that_names_a_tied_head_quantises_it_and_not_the_embedding(implementation: str) -> None:
    rules = [{"roles": "head", "format": {"kind": "fp8-block", "implementation": implementation}}]
    model = cf.build(spec({"kind": "bf16", "rules": rules}, tied=True), seed=0)
    assert isinstance(head_map(model), Scaled)
    found, hidden = logits(model)
    weight = model.embedding.weight
    plain = cf.build(spec({"kind": "bf16"}, tied=True), seed=0)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(model.embedding(ids), plain.embedding(ids))
    rows = hidden.detach().flatten(0, 1)
    mass = magnitude(rows, (1, 128), E4M3, RECIPE) @ magnitude(weight.detach(), (128, 128), E4M3, RECIPE).mT
    bound = RECIPE.error_bound(HIDDEN) + RECIPE.fast_error(HIDDEN)
    error = (found.detach().double().flatten(0, 1) - rows.double() @ weight.detach().double().mT).abs()
    assert (error <= (bound + BF16 * (1 + bound)) * mass).all()
    assert error.max() > 0
    found.float().square().sum().backward()
    assert weight.grad is not None
    # Both uses reach the one parameter: rows of tokens that were never read get the head's part alone.
    assert weight.grad[30:].any()


def test_released_weights_are_codes_beside_bfloat16_and_do_not_train() -> None:
    model = cf.build(spec({"kind": "fp8-block", "weights": "float8_e4m3fn"}), seed=0)
    dtypes = {name: each.dtype for name, each in model.state_dict().items()}
    for name, dtype in dtypes.items():
        if name.endswith("weight_scale_inv"):
            assert dtype == torch.float32
        elif f"{name}_scale_inv" in dtypes:
            assert dtype == torch.float8_e4m3fn
        else:
            assert dtype == torch.bfloat16
    trained = {name for name, _ in model.named_parameters()}
    assert trained == {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert tuple(model.state_dict()["layers.0.mixer.kv_a.weight_scale_inv"].shape) == (2, 2)
    found, _ = logits(model)
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["fp8-block", "fp8-tensor", "mxfp8"])
def test_formats_are_masters_in_float32_and_moments_in_bfloat16(kind: str) -> None:
    formats = spec({"kind": kind}).formats.tensors
    for name, form in formats.items():
        scaled = form.compute == "float8_e4m3fn"
        assert scaled == (name.startswith("layers") and "norm" not in name)
        assert form.storage == form.gradient == form.gather == "float32"
        assert form.moment == "bfloat16"
        assert form.bits == (8 if scaled else 32)
        assert (form.block is not None) == (form.scale is not None) == scaled
    again = spec({"kind": kind, "moments": "float32"}).formats.tensors
    assert {form.moment for form in again.values()} == {"float32"}


@pytest.mark.parametrize("kind", ["fp8-block", "fp8-tensor"])
@pytest.mark.parametrize("scales", ["float32", "ue8m0"])
def test_formats_of_stored_weights_are_those_of_their_codec(kind: str, scales: str) -> None:
    formats = spec({"kind": kind, "scales": scales, "weights": "float8_e4m3fn"}).formats
    form = formats.tensors["layers.0.mixer.kv_a.weight"]
    assert (form.storage, form.codec) == ("float8_e4m3fn", "f8-128x128")
    assert (form.block, form.scale) == ((128, 128), "float32")
    assert formats.tensors["embedding.weight"].storage == "bfloat16"


def test_weights_in_bfloat16_train_in_bfloat16() -> None:
    model = cf.build(spec({"kind": "fp8-block", "weights": "bfloat16"}), seed=0)
    found, _ = logits(model)
    found.square().sum().backward()
    down = model.layers[0].ffn.down.weight  # type: ignore[union-attr, index]
    assert down.dtype == torch.bfloat16
    assert down.grad is not None
    assert down.grad.dtype == torch.bfloat16


def test_implementation_that_can_not_serve_is_one_error_by_name_and_a_notice_by_auto(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A command that ran in this process before keeps the project's lines to itself.
    monkeypatch.setattr(logging.getLogger("composeformer"), "propagate", True)
    with pytest.raises(cf.ComposeError) as told:
        cf.build(spec({"kind": "fp8-block", "implementation": "triton"}), device="cpu")
    assert len(told.value.lines) == 1
    assert "its kernel is for cuda devices" in str(told.value)
    with caplog.at_level("INFO", "composeformer"):
        cf.build(spec({"kind": "fp8-block", "accumulator_bits": 14}), device="meta")
    assert any("fast to reference" in line for line in caplog.messages)


@pytest.mark.parametrize("base", [{"kind": "bf16"}, {"kind": "full", "dtype": "float64"}])
@pytest.mark.parametrize("form", ["fp8-block", "mxfp8", "int8"])
def test_experts_of_any_width_are_multiplied_as_their_format_says(base: dict[str, Any], form: str) -> None:
    """Also where PyTorch has no grouped product of that width or dtype; it is not what multiplies them."""
    rules = [{"roles": "layers.1.ffn", "format": form}]
    odd = cf.Spec.load("tiny-moe").with_({"ffn.experts.intermediate_size": 20}, precision={**base, "rules": rules})
    choices = cf.build(odd, device="meta").choices
    assert set(choices["layers.1.ffn"].values()) == {"grouped"}
    assert set(choices["layers.0.ffn"].values()) == {"batched"}
    model = cf.build(odd, seed=0)
    asked: list[Any] = []
    for name in ("gate", "up", "down"):
        getattr(model.layers[1].ffn, name).register_forward_hook(lambda *given: asked.append(given[2].dtype))  # type: ignore[union-attr, index]
    assert model(torch.arange(12)[None]).logits.isfinite().all()
    assert asked == [torch.float64 if base["kind"] == "full" else torch.bfloat16] * 3


def test_unknown_format_is_one_error_that_names_the_nearest() -> None:
    with pytest.raises(cf.ComposeError) as told:
        spec({"kind": "fp8-blok"})
    assert "fp8-block" in str(told.value)
