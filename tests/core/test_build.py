"""From a spec to modules: what is built is what was declared, and each phase is served as asked."""

import copy
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from composeformer import lazy
from composeformer.assemble import TensorSite, build, fill, skeleton
from composeformer.config import Config, config, field
from composeformer.contracts import Component, Facts, Implementation, Linear, Weight
from composeformer.errors import ComposeError, InputError, PluginError, SpecError
from composeformer.model_cache import ModelCache
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry
from composeformer.spec import Spec
from composeformer.spec.document import from_data
from composeformer.tensors import Batch, Output

IDS = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))


def test_meta_models_have_shapes_only() -> None:
    model = build("llama-3.1-405b", device="meta")
    assert model.device.type == "meta"
    assert sum(parameter.numel() for parameter in model.parameters()) == 405_853_388_800


# Shared tensors.


def tied() -> nn.Module:
    model = build("tiny-llama")
    assert model.spec.model.tie_embeddings
    return model


def is_tied(model: Any) -> bool:
    same = model.head.projection.weight is model.embedding.weight
    return (
        same and model.state_dict()["head.projection.weight"].data_ptr() == model.embedding.weight.data_ptr()
    )


def test_a_tied_matrix_is_one_parameter_and_stays_one() -> None:
    model: Any = tied()
    assert is_tied(model)
    assert "head.projection.weight" not in dict(model.named_parameters())
    for changed in (
        copy.deepcopy(model),
        tied().to(torch.bfloat16),
        tied().double().half(),
        tied().to_empty(device="cpu"),
        tied().requires_grad_(False),
        tied().eval(),
    ):
        assert is_tied(changed)
    other: Any = copy.deepcopy(model)
    assert other.embedding.weight is not model.embedding.weight
    other.load_state_dict(tied().state_dict())
    assert is_tied(other)


def test_a_tied_matrix_gets_both_gradients() -> None:
    model: Any = tied()
    model(IDS).logits.square().sum().backward()
    both = model.embedding.weight.grad.clone()
    untied: Any = build(model.spec.with_({"model.tie_embeddings": False}))
    with torch.no_grad():
        untied.head.projection.weight.copy_(untied.embedding.weight)
    untied(IDS).logits.square().sum().backward()
    torch.testing.assert_close(both, untied.embedding.weight.grad + untied.head.projection.weight.grad)


# Values.


def test_every_tensor_needs_one_value_of_its_shape() -> None:
    model = skeleton(Spec.load("tiny-llama"))
    values = {name: torch.zeros(w.shape) for name, w in model.spec.plan.tensors.items()}
    first = next(iter(values))
    for wrong, told in (
        (
            {**values, "embeding.weight": values[first]},
            "embeding.weight: the model has no tensor of this name; did",
        ),
        ({**values, first: torch.zeros(2)}, "embedding.weight: has shape"),
        ({name: values[name] for name in list(values)[1:]}, "no value given for embedding.weight"),
        (
            {**values, "head.projection.weight": values[first]},
            "head.projection.weight: has its value already",
        ),
    ):
        with pytest.raises(InputError, match=told):
            fill(skeleton(model.spec), wrong.items(), "cpu")
    seen: list[tuple[int, int]] = []
    fill(model, values.items(), "cpu", lambda done, total: seen.append((done, total)))
    assert seen == [(index, len(values)) for index in range(1, len(values) + 1)]
    assert is_tied(model)


# Precision and devices.


def test_a_dtype_is_that_of_the_default_policy() -> None:
    for found in (Spec.load("tiny-llama"), Spec.load("tiny-llama").with_(precision={"kind": "full"})):
        model = skeleton(found, dtype="bfloat16")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.spec.single("precision").config.dtype == "bfloat16"
        assert model.spec.fingerprint == found.fingerprint
    stated = Spec.load("tiny-llama").with_(precision={"kind": "full", "dtype": "float64"})
    assert {p.dtype for p in skeleton(stated).parameters()} == {torch.float64}
    assert {p.dtype for p in skeleton(stated, dtype="float16").parameters()} == {torch.float16}


def test_a_dtype_takes_the_place_of_another_policy() -> None:
    found = Spec.load("tiny-deepseek-v3").with_(precision={"kind": "fp8-block", "gradients": "e5m2"})
    model = skeleton(found, dtype="float64")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.spec.single("precision").kind == "full"
    with pytest.raises(InputError, match="dtype = int8: must be one of float32, bfloat16, float16, float64"):
        skeleton(found, dtype="int8")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:99", "mps:7", "cpu:x", "xla", "cuda"])
def test_a_device_that_is_not_there_is_one_clear_error(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"device = {device}: "):
        build("tiny-llama", device=device)


# Modules that do not keep to what their configs declare.


@config
class Odd(Config):
    """Declares a map, a parameter and a buffer."""

    size: int = field(1, minimum=1)
    trains = True

    def tensors(self, site: Any) -> Any:
        yield Linear(name="map", inputs=site.width, outputs=site.width)
        yield Weight(name="scale", shape=(3,))
        yield Weight(name="count", shape=(3,), trains=False, dtype="int64")


class Good(nn.Module):
    def __init__(self, config: Odd, site: TensorSite) -> None:
        super().__init__()
        self.map, self.scale, self.count = site.linear("map"), site.weight("scale"), site.weight("count")

    def forward(self, x: Tensor, batch: Batch) -> Output:
        return Output(self.map(x) * type(self).factor())

    @classmethod
    def factor(cls) -> float:
        return 1.0


class Decoding(Good):
    @classmethod
    def factor(cls) -> float:
        return 2.0


class TakesTooLittle(Good):
    def __init__(self, config: Odd, site: TensorSite) -> None:
        nn.Module.__init__(self)
        self.map = site.linear("map")


class TakesUndeclared(Good):
    def __init__(self, config: Odd, site: TensorSite) -> None:
        super().__init__(config, site)
        self.more = site.weight("more")


class TakesTwice(Good):
    def __init__(self, config: Odd, site: TensorSite) -> None:
        super().__init__(config, site)
        self.again = site.linear("map")


class TakesAsAnother(Good):
    def __init__(self, config: Odd, site: TensorSite) -> None:
        nn.Module.__init__(self)
        self.map = site.weight("map")


class MakesItsOwn(Good):
    def __init__(self, config: Odd, site: TensorSite) -> None:
        super().__init__(config, site)
        self.extra = nn.Linear(2, 2)


class HidesABuffer(Good):
    def __init__(self, config: Odd, site: TensorSite) -> None:
        super().__init__(config, site)
        self.register_buffer("table", torch.zeros(2), persistent=False)


class Renames(Good):
    def __init__(self, config: Odd, site: TensorSite) -> None:
        super().__init__(config, site)
        self.weight = self.scale
        del self.scale


class Reshapes(Good):
    def __init__(self, config: Odd, site: TensorSite) -> None:
        super().__init__(config, site)
        self.scale = nn.Parameter(torch.zeros(4))


class Freezes(Good):
    def __init__(self, config: Odd, site: TensorSite) -> None:
        super().__init__(config, site)
        value = self.scale.data
        del self.scale
        self.register_buffer("scale", value)


@pytest.fixture
def spec_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Spec]:
    """A tiny spec whose ffn is computed by given classes: `spec_with({"reference": Good}, table)`."""

    def make(classes: dict[str, type[nn.Module]], table: dict[str, Any] | None = None, **needs: Any) -> Spec:
        modules = {f"odd:{name}": cls for name, cls in classes.items()}
        true = lazy.load
        monkeypatch.setattr(lazy, "load", lambda name: modules[name] if name in modules else true(name))
        offered = tuple(Implementation(name, f"odd:{name}", **needs.get(name, {})) for name in classes)
        info = PluginInfo(
            name="odd",
            distribution="odd",
            version="1",
            origin="",
            status="loaded",
            components=(Component("ffn", "odd", Odd, offered),),
        )
        data = Spec.load("tiny-llama").to_dict()
        data |= {"ffn": {"kind": "odd", **(table or {})}, "layers": [{"repeat": 2}]}
        return Spec(from_data(data), Registry([*current().registry.infos, info]))

    return make


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (TakesTooLittle, "ffn odd at layers.0.ffn declares count, scale but takes none of that name"),
        (
            TakesUndeclared,
            "ffn odd at layers.0.ffn takes a weight 'more' but declares none; declared: scale, count",
        ),
        (TakesTwice, "ffn odd at layers.0.ffn takes its linear map 'map' twice"),
        (TakesAsAnother, "ffn odd at layers.0.ffn takes a weight 'map' but declares none"),
        (MakesItsOwn, "layers.0.ffn.extra.bias, layers.0.ffn.extra.weight, .*: is built but not declared"),
        (HidesABuffer, "layers.0.ffn.table, layers.1.ffn.table: is a buffer that is not saved"),
        (Renames, "layers.0.ffn.weight, layers.1.ffn.weight: is built but not declared"),
        (Reshapes, r"layers.0.ffn.scale: built with shape \(4,\), declared with \(3,\)"),
        (Freezes, "layers.0.ffn.scale: built as Tensor, declared with trains = True"),
    ],
)
def test_a_module_that_breaks_its_word_is_named(spec_with: Any, cls: type[nn.Module], told: str) -> None:
    with pytest.raises(PluginError, match=told):
        skeleton(spec_with({"reference": cls}))


def test_parameters_and_buffers_are_what_was_declared(spec_with: Any) -> None:
    model = build(spec_with({"reference": Good}))
    ffn: Any = model.layers[0].ffn
    assert isinstance(ffn.scale, nn.Parameter)
    assert ffn.count.dtype == torch.int64
    assert "layers.0.ffn.count" in model.state_dict()
    assert "layers.0.ffn.count" not in dict(model.named_parameters())
    assert dict(model.named_buffers())["layers.0.ffn.count"] is ffn.count


# Implementations by phase.


def both(spec_with: Any) -> Any:
    table = {"implementation": {"train": "reference", "decode": "fast"}}
    return build(spec_with({"reference": Good, "fast": Decoding}, table))


def ffn_of(model: Any, phase: str) -> Tensor:
    x = torch.ones(1, 1, 64)
    batch = SimpleNamespace(phase=phase)
    found: Tensor = model.layers[0].ffn(x, batch).hidden
    return found


def test_phases_are_served_by_their_implementations_over_one_state(spec_with: Any) -> None:
    model = both(spec_with)
    assert model.choices["layers.0.ffn"] == {"train": "reference", "prefill": "reference", "decode": "fast"}
    torch.testing.assert_close(ffn_of(model, "decode"), 2 * ffn_of(model, "train"))
    assert len(list(model.layers[0].ffn.parameters())) == 2
    for changed in (copy.deepcopy(model), both(spec_with).to(torch.float32)):
        with torch.no_grad():
            changed.layers[0].ffn.map.weight.mul_(3)
        torch.testing.assert_close(ffn_of(changed, "train"), 3 * ffn_of(model, "train"))
        torch.testing.assert_close(ffn_of(changed, "decode"), 6 * ffn_of(model, "train"))
    torch.testing.assert_close(ffn_of(model, "decode"), 2 * ffn_of(model, "train"))


def test_a_deep_copy_shares_no_state_with_its_original(spec_with: Any) -> None:
    model = both(spec_with)
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        assert parameter.data_ptr() != dict(model.named_parameters())[name].data_ptr()
    other.layers[0].ffn.mark = 1
    views = other.layers[0].ffn.forward._views
    assert views["decode"].mark == 1
    assert not hasattr(model.layers[0].ffn, "mark")


def test_attention_decodes_with_another_implementation_and_the_same_weights() -> None:
    found = Spec.load("tiny-llama")
    mixed = found.with_({"mixer.attention.implementation": {"train": "reference", "decode": "sdpa"}})
    model, plain = build(mixed), build(found.with_({"mixer.attention.implementation": "reference"}))
    assert model.choices["layers.0.mixer"]["train"] == "reference"
    assert model.choices["layers.0.mixer"]["decode"] == "sdpa"
    with torch.no_grad():
        whole = plain(IDS).logits
        cache: ModelCache = model.new_cache(2, 9)
        steps = [model(IDS[:, :5], cache=cache).logits]
        steps += [model(IDS[:, t : t + 1], cache=cache).logits for t in range(5, 9)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_an_implementation_that_can_not_serve_is_one_clear_error(tmp_path: Any) -> None:
    path = tmp_path / "mine.toml"
    text = Spec.load("tiny-llama").with_({"mixer.attention.sinks": True}).to_toml()
    path.write_text(text.replace("sinks = true", 'sinks = true\nimplementation = "sdpa"'))
    line = path.read_text().splitlines().index('implementation = "sdpa"') + 1
    with pytest.raises(SpecError) as caught:
        build(path, device="meta")
    assert caught.value.lines == (
        f'{path}:{line}: mixer.attention.implementation = "sdpa": can not serve train here: '
        "scaled_dot_product_attention has no sinks (layers.0.mixer)",
    )


def test_a_fallback_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "composeformer"):
        model = build("tiny-llama", device="meta", overrides=["mixer.attention.sinks=true"])
    assert model.choices["layers.2.mixer"]["decode"] == "reference"
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"layers.0.mixer: mixer gqa in {phase} falls back from sdpa to reference: "
        "scaled_dot_product_attention has no sinks"
        for phase in ("train", "prefill", "decode")
    ]


def test_needs_are_asked_with_the_site_the_machine_and_the_phase(spec_with: Any) -> None:
    asked: list[Facts] = []

    def needs(facts: Facts) -> str | None:
        asked.append(facts)
        return "no" if facts.phase == "train" else None

    found = spec_with(
        {"fast": Decoding, "reference": Good}, fast={"needs": needs, "phases": ("train", "decode")}
    )
    model = skeleton(found, dtype="bfloat16")
    assert model.choices["layers.1.ffn"] == {"train": "reference", "prefill": "reference", "decode": "fast"}
    facts = asked[0]
    assert (facts.device, facts.dtype, facts.site.path, facts.config.size) == (
        "cpu",
        "bfloat16",
        "layers.0.ffn",
        1,
    )
    assert {facts.phase for facts in asked} == {"train", "decode"}


def test_where_nothing_serves_all_reasons_are_given(spec_with: Any) -> None:
    refusing = {"needs": lambda facts: "too small"}
    with pytest.raises(
        SpecError, match=r"ffn.kind = \"odd\": nothing serves train here: a: too small; b: too small"
    ):
        skeleton(spec_with({"a": Good, "b": Good}, a=refusing, b=refusing))


def test_a_part_that_is_never_told_the_phase_has_one_implementation() -> None:
    norm = current().registry.get("norm", "rmsnorm")
    other = attrs.evolve(norm.implementations[0], name="other")
    component = attrs.evolve(norm, kind="two", implementations=(*norm.implementations, other))
    info = PluginInfo(
        name="odd", distribution="odd", version="1", origin="", status="loaded", components=(component,)
    )
    registry = Registry([*current().registry.infos, info])
    data = Spec.load("tiny-llama").to_dict()

    def found(implementation: Any) -> Spec:
        norms = {"rms": {"kind": "two", "implementation": implementation}}
        return Spec(from_data(data | {"norm": norms, "unverified": []}), registry)

    chosen = skeleton(found({"decode": "other"})).choices["residual.norm"]
    assert set(chosen.values()) == {"other"}
    with pytest.raises(ComposeError, match="a norm is not told the phase; choose one implementation for all"):
        skeleton(found({"decode": "other", "train": "reference"}))


def test_a_model_larger_than_the_machine_is_refused_before_anything_is_drawn():
    with pytest.raises(InputError, match=r"1,?\d*,?\d*\.\d GB of tensors are more than the .* GB of cpu"):
        build("deepseek-v3", dtype="bfloat16")
