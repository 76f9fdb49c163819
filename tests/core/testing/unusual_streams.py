"""What stands around sublayers and heads: a norm without statistics, streams of several lanes, positions that stop.

Shapes: B rows, T tokens, D features, N lanes, H heads, R pairs that turn.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from composeformer.config import Config, config, field, part
from composeformer.contracts import Component, Constant, Declared, Implementation, Part, Weight
from composeformer.errors import Problem
from composeformer.site import Site
from composeformer.tensors import Batch, Output, Rotary, merge

Sublayers = Mapping[str, Callable[[Tensor], Output]]


@config
class DynamicTanh(Config):
    """w tanh(a x) + b in place of a norm (arXiv 2503.10622): no statistics, no eps."""

    alpha: float = field(0.5, above=0.0, maximum=2.0, affects="training", help="Where a starts.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Weight(name="alpha", shape=(1,), init=Constant(self.alpha))
        yield Weight(name="weight", shape=(site.width,), init=Constant(1.0))
        yield Weight(name="bias", shape=(site.width,), init=Constant(0.0))


class DynamicTanhNorm(nn.Module):
    alpha: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, config: DynamicTanh, site: Any) -> None:
        super().__init__()
        self.alpha, self.weight, self.bias = (site.weight(name) for name in ("alpha", "weight", "bias"))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        alpha, weight, bias = (each.to(wide) for each in (self.alpha, self.weight, self.bias))
        return (torch.tanh(x.to(wide) * alpha) * weight + bias).to(x.dtype)


@config
class Hyper(Config):
    """N lanes (arXiv 2409.19606, static): a sublayer reads a mix of them, and each gains a share of what it gives."""

    lanes: int = field(2, minimum=1, maximum=4, unit="lanes", help="How wide the stream is.")
    norm: Part = part("norm", help="Normalises what sublayers read and the last hidden states.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        if site.layer is None:
            yield site.part(self.norm, "norm")
        for name in site.sublayers:
            yield site.part(self.norm, f"{name}_norm")
            yield Weight(name=f"{name}_read", shape=(self.lanes,), init=Constant(1 / self.lanes))
            yield Weight(name=f"{name}_write", shape=(self.lanes,), init=Constant(1.0))
            yield Weight(name=f"{name}_mix", shape=(self.lanes, self.lanes))


class HyperConnections(nn.Module):
    """Its stream is (B, T, N, D)."""

    def __init__(self, config: Hyper, site: Any) -> None:
        super().__init__()
        self.lanes = config.lanes
        for name in site.sublayers:
            setattr(self, f"{name}_norm", site.part(f"{name}_norm"))
            for weight in ("read", "write", "mix"):
                setattr(self, f"{name}_{weight}", site.weight(f"{name}_{weight}"))
        if site.layer is None:
            self.norm = site.part("norm")

    def forward(self, stream: Tensor, batch: Batch, sublayers: Sublayers) -> Output:
        aux = []
        for name, sublayer in sublayers.items():
            read, write, mix = (getattr(self, f"{name}_{weight}") for weight in ("read", "write", "mix"))
            wide = torch.promote_types(stream.dtype, read.dtype)
            lanes = stream.to(wide)
            joined = (lanes * read.to(wide)[:, None]).sum(-2).to(stream.dtype)
            output = sublayer(getattr(self, f"{name}_norm")(joined))
            # Sums by hand, which no width or number of tokens makes in another order.
            mixed = lanes + (lanes[..., None, :, :] * mix.to(wide)[..., None]).sum(-2)
            stream = (mixed + output.hidden.to(wide)[..., None, :] * write.to(wide)[:, None]).to(stream.dtype)
            aux.append(output.aux)
        return Output(stream, merge(aux))

    def open(self, x: Tensor) -> Tensor:
        return x[..., None, :].expand(*x.shape[:-1], self.lanes, x.shape[-1])

    def close(self, stream: Tensor) -> Tensor:
        return self.norm(stream.sum(-2))


@config
class ReZero(Config):
    """x + a f(x), a learnt and at first zero; no norms at all (arXiv 2003.04887)."""

    def tensors(self, site: Site) -> Iterable[Declared]:
        for name in site.sublayers:
            yield Weight(name=f"{name}_gate", shape=(1,), init=Constant(0.0))


class ReZeroResidual(nn.Module):
    def __init__(self, config: ReZero, site: Any) -> None:
        super().__init__()
        for name in site.sublayers:
            setattr(self, f"{name}_gate", site.weight(f"{name}_gate"))

    def forward(self, stream: Tensor, batch: Batch, sublayers: Sublayers) -> Output:
        aux = []
        for name, sublayer in sublayers.items():
            output, gate = sublayer(stream), getattr(self, f"{name}_gate")
            stream = stream + (gate * output.hidden).to(stream.dtype)
            aux.append(output.aux)
        return Output(stream, merge(aux))

    def open(self, x: Tensor) -> Tensor:
        return x

    def close(self, stream: Tensor) -> Tensor:
        return stream


@config
class Leaky(Config):
    """Rotary positions that move on by less beyond some distance (arXiv 2401.01325), of a share of all pairs alone."""

    theta: float = field(10000.0, above=1.0, help="The longest wavelength, in positions per radian.")
    reach: int = field(16, minimum=1, unit="tokens", help="Where they begin to move on by less.")
    step: float = field(0.25, minimum=0.0, maximum=1.0, help="By how much they move on there.")
    turning: float = field(0.5, above=0.0, maximum=1.0, help="The share of pairs that turn: the fastest.")

    def validate(self, site: Site) -> Iterable[Problem]:
        if site.width % 2:
            yield Problem("turning", self.turning, f"needs pairs, and a head has {site.width} features")


class LeakyRotary(nn.Module):
    key: str

    def __init__(self, config: Leaky, site: Any) -> None:
        super().__init__()
        self.config, self.pairs = config, site.width // 2

    def forward(self, positions: Tensor) -> Rotary:
        at, reach = positions.double(), self.config.reach
        at = torch.where(at < reach, at, reach + (at - reach) * self.config.step)
        places = torch.arange(self.pairs, device=at.device, dtype=torch.float64)
        turn = (places < self.config.turning * self.pairs) * self.config.theta ** -(
            places / max(self.pairs, 1)
        )
        angles = at[..., None] * turn
        return Rotary(angles.cos().float(), angles.sin().float())

    def rotate(self, x: Tensor, rotary: Rotary, inverse: bool = False) -> Tensor:
        cos, sin = (table[:, :, None] for table in rotary)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        sin = -sin if inverse else sin
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


COMPONENTS = tuple(
    Component(slot, kind, made, (Implementation("reference", f"{__name__}:{module}"),), claims=claims)
    for slot, kind, made, module, claims in (
        ("norm", "dynamic-tanh", DynamicTanh, "DynamicTanhNorm", ()),
        ("residual", "hyper-connections", Hyper, "HyperConnections", ()),
        ("residual", "rezero", ReZero, "ReZeroResidual", ("identity",)),
        ("position", "leaky", Leaky, "LeakyRotary", ()),
    )
)
