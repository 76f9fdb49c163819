"""What a precision policy or an exchange does wrong is told as its own plugin's, not as that of the part it serves."""

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from composeformer import lazy
from composeformer.assemble import build, skeleton
from composeformer.config import Config, config, field
from composeformer.contracts import Component, Implementation, Weight
from composeformer.errors import PluginError
from composeformer.formats import Format, plain
from composeformer.plugins import current
from composeformer.precision import Precision
from composeformer.registry import PluginInfo, Registry
from composeformer.spec import Spec
from composeformer.spec.document import from_data

DTYPES = "float64, float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, float8_e8m0fnu, int64, int8, uint8, bool"


@config
class Odd(Precision):
    """Everything in float32, or what a test asks for."""

    stream: str = field(default="float32", affects="execution")
    storage: str = field(default="float32", affects="execution")
    codec: str | None = field(default=None, affects="execution")
    divisor: int = field(default=1, affects="execution")

    @property
    def activations(self) -> str:
        return self.stream

    def format(self, role: str, weight: Weight, sensitive: bool) -> Format:
        codec = None if sensitive else self.codec
        return attrs.evolve(plain("float32", "odd"), storage=self.storage, codec=codec, bits=32 // self.divisor)


class Whole(nn.Module):
    """A linear map that has all that is asked of one."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.dtype = torch.float32

    def matrix(self) -> Tensor:
        return self.weight


class Bare(nn.Module):
    """One that holds its weight, and no more."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight


class Policy:
    made: type[nn.Module] = Whole

    def __init__(self, config: Odd) -> None:
        self.activations = torch.float32

    def linear(
        self,
        role: str,
        declared: Any,
        weight: Tensor,
        bias: nn.Parameter | None,
        *,
        scales: Sequence[Tensor] = (),
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        return self.made(weight, bias)


class Poor(Policy):
    made = Bare


class Old:
    """A policy of a signature that was never asked for."""

    def __init__(self, config: Odd) -> None:
        self.activations = torch.float32

    def linear(self, role: str, declared: Any, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        return Whole(weight, bias)


class Hollow:
    """An exchange that does nothing."""

    def __init__(self, config: Config, groups: int, group: object) -> None:
        self.ledger = None


@config
class Carrier(Config):
    """An exchange on paper alone."""

    processes = "one"

    def declared(self, *_: Any, **__: Any) -> Any:
        return ()

    def expected(self, *_: Any, **__: Any) -> Any:
        return None


@config
class Rows(Config):
    """Every row in float16 beside a scale in float32."""

    def stored(self, weight: Weight) -> tuple[Weight, ...]:
        scale = Weight(name=f"{weight.name}_scale", shape=(*weight.shape[:-1], 1), dtype="float32", trains=False)
        return attrs.evolve(weight, dtype="float16", trains=False, init=None), scale

    def cut(self, dim: int, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        return (start, stop), (start, stop) if dim == -2 else (0, 1)


@config
class Misspelt(Rows):
    def stored(self, weight: Weight) -> tuple[Weight, ...]:
        codes, scale = super().stored(weight)
        return attrs.evolve(codes, dtype="half"), scale


class RowsCodec:
    def __init__(self, config: Config) -> None:
        pass

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        scale = value.abs().amax(-1, keepdim=True)
        return (value / scale).half(), scale


class Wide(RowsCodec):
    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        codes, scale = super().encode(value)
        return codes.float(), scale, scale


class Mute:
    def __init__(self, config: Config) -> None:
        pass


class Keeping(nn.Module):
    """A linear map that keeps codes and scales."""

    bias = None
    dtype = torch.float32

    def __init__(self, weight: Tensor, scales: Sequence[Tensor]) -> None:
        super().__init__()
        self.weight = weight
        (self.weight_scale,) = scales

    def matrix(self) -> Tensor:
        return self.weight.float() * self.weight_scale


class Coded(Policy):
    def linear(self, role: str, declared: Any, weight: Tensor, bias: Any, **more: Any) -> nn.Module:
        return Keeping(weight, more["scales"]) if more["scales"] else Whole(weight, bias)


def spec(
    monkeypatch: pytest.MonkeyPatch,
    policy: type,
    rows: type[Config] = Rows,
    codec: type = RowsCodec,
    **tables: dict[str, Any],
) -> Spec:
    true = lazy.load
    modules: dict[str, Any] = {"odd:Policy": policy, "odd:Exchange": Hollow, "odd:Codec": codec}
    monkeypatch.setattr(lazy, "load", lambda name: modules[name] if name in modules else true(name))
    components = (
        Component("precision", "odd", Odd, (Implementation("reference", "odd:Policy"),)),
        Component("comm", "odd", Carrier, (Implementation("reference", "odd:Exchange"),)),
        Component("codec", "odd", rows, (Implementation("reference", "odd:Codec"),)),
    )
    info = PluginInfo(
        name="odd", distribution="odd", version="1", origin="", status="loaded", components=components
    )
    data = Spec.load("tiny-moe").to_dict() | tables
    return Spec(from_data(data), Registry([*current().registry.infos, info]))


@pytest.mark.parametrize(
    ("policy", "fields", "told"),
    [
        (Poor, {}, "layers.0.mixer.q: its linear map: TypeError: a Bare has no bias, dtype, matrix"),
        (
            Old,
            {},
            "layers.0.mixer.q: its linear map: TypeError: Old.linear() got an unexpected keyword argument 'scales'",
        ),
        (
            Policy,
            {"storage": "float23"},
            f"embedding.weight: its format: ValueError: \"float23\" is no dtype; there are {DTYPES}; did you mean "
            "'float32'?",
        ),
        (
            Policy,
            {"divisor": 0},
            "embedding.weight: its format: ZeroDivisionError: integer division or modulo by zero",
        ),
        (
            Policy,
            {"stream": "bf16"},
            f'precision: its activations: ValueError: "bf16" is no dtype; there are {DTYPES}; did you mean '
            "'bfloat16'?",
        ),
    ],
)
def test_a_policy_that_breaks_its_word_is_named(
    monkeypatch: pytest.MonkeyPatch, policy: type, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(PluginError) as caught:
        skeleton(spec(monkeypatch, policy, precision={"kind": "odd", **fields}))
    assert caught.value.lines == (f"plugin odd (odd 1): precision odd at {told}",)


def test_a_rule_s_policy_is_named_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"roles": "layers.1.ffn", "format": "odd"}]
    with pytest.raises(PluginError) as caught:
        skeleton(spec(monkeypatch, Poor, precision={"kind": "full", "rules": rules}))
    assert caught.value.lines[0].startswith("plugin odd (odd 1): precision odd at layers.1.ffn.")


def test_an_exchange_that_can_not_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError) as caught:
        skeleton(spec(monkeypatch, Policy, comm={"kind": "odd"}))
    told = "its exchange: TypeError: a Hollow has no exchange, dispatch, combine"
    assert caught.value.lines == (f"plugin odd (odd 1): comm odd at comm: {told}",)


@pytest.mark.parametrize(
    ("rows", "codec", "told"),
    [
        (
            Misspelt,
            RowsCodec,
            f'its stored tensors: ValueError: "half" is no dtype; there are {DTYPES}',
        ),
        (
            Rows,
            Wide,
            "its codes: TypeError: encode gives float32, float32, float32, stored declares float16, float32",
        ),
        (Rows, Mute, "its codes: AttributeError: 'Mute' object has no attribute 'encode'"),
    ],
)
def test_a_codec_that_breaks_its_word_is_named(
    monkeypatch: pytest.MonkeyPatch, rows: type[Config], codec: type, told: str
) -> None:
    found = spec(monkeypatch, Coded, rows, codec, precision={"kind": "odd", "codec": "odd"})
    with pytest.raises(PluginError) as caught:
        build(found)
    assert caught.value.lines == (f"plugin odd (odd 1): codec odd at layers.0.mixer.q.weight: {told}",)


def test_a_policy_that_keeps_its_word_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skeleton(spec(monkeypatch, Policy, precision={"kind": "odd"}))
    assert isinstance(model.layers[0].mixer.q, Whole)  # type: ignore[union-attr, index]
    coded = build(spec(monkeypatch, Coded, precision={"kind": "odd", "codec": "odd"}), seed=0)
    plain = build(spec(monkeypatch, Policy, precision={"kind": "odd"}), seed=0)
    found, exact = (each.layers[0].mixer.q.matrix().detach() for each in (coded, plain))  # type: ignore[union-attr, index]
    # float16 of a row over its largest number, times that in fp32.
    assert bool(((found - exact).abs() <= (2**-11 + 2**-23) * exact.abs().amax(-1, keepdim=True)).all())
