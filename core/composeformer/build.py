"""From a plan to modules: every part is constructed on the meta device, then its tensors are given values.

A part's module asks its `TensorSite` for what its config declared; nothing undeclared exists, and nothing
declared may be left out. Values come later, by name: initial ones, or a folder's.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from composeformer import lazy
from composeformer.contracts import PHASES, Facts, Implementation, Linear, Part, Phase, Weight
from composeformer.decoder import Layer, Model
from composeformer.errors import InputError, Problem, SpecError, join
from composeformer.init import initial
from composeformer.plan import Node
from composeformer.site import Site
from composeformer.spec import Spec
from composeformer.tensors import DTYPES

log = logging.getLogger(__name__)


class TensorSite:
    """A site with tensors: what a part's module is constructed with, beside its config."""

    def __init__(self, node: Node, builder: "Builder") -> None:
        self._node = node
        self._builder = builder
        self._modules: dict[str, nn.Module] = {}
        self._taken: set[str] = set()
        site = node.site
        self.path, self.slot, self.layer, self.width = site.path, site.slot, site.layer, site.width
        self.spec, self.sublayers = site.spec, site.sublayers
        self.hidden_size, self.num_layers = site.hidden_size, site.num_layers

    def linear(self, name: str) -> Any:
        """The linear map declared as `name`, as the precision policy computes it."""
        return self._once(name, lambda: self._builder.linear(join(self.path, name), self._node.linears[name]))

    def weight(self, name: str) -> Any:
        """The tensor declared as `name`: a parameter, or a buffer if it does not train."""
        self._taken.add(name)
        return self._builder.tensor(join(self.path, name), self._node.weights[name])

    def part(self, name: str) -> Any:
        """The module of the part declared as `name`."""
        return self._once(name, lambda: self._builder.module(self._node.children[name]))

    def replicated(self, x: Tensor) -> Tensor:
        """`x`, which every process holds and local heads read; its gradients are summed over processes."""
        return x

    def _once(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        self._taken.add(name)
        if name not in self._modules:
            self._modules[name] = make()
        return self._modules[name]

    def check(self) -> None:
        """Raises TypeError where the module left something declared untaken."""
        declared = {*self._node.linears, *self._node.weights, *self._node.children}
        if missing := declared - self._taken:
            raise TypeError(f"{self._node.slot} {self._node.part.kind} at {self.path} declares {sorted(missing)} but takes none")


class Builder:
    """Constructs one model on the meta device."""

    def __init__(self, spec: Spec, precision: Part, device: str) -> None:
        self.spec = spec
        self.device = device
        self.policy = lazy.load(precision.component.implementations[0].module)(precision.config)
        self.choices: dict[str, dict[Phase, str]] = {}
        self._tensors: dict[str, Tensor] = {}
        self._positions: dict[tuple[Part, int], Any] = {}
        self.tables: dict[str, Any] = {}

    def model(self) -> Model:
        plan = self.spec.plan
        with torch.device("meta"):
            embedding = self.module(plan.embedding)
            layers = []
            for nodes in plan.layers:
                parts = {slot: self.module(node) for slot, node in nodes.items()}
                layers.append(Layer(parts.get("mixer"), parts.get("ffn"), parts["residual"]))
            residual, head = self.module(plan.residual), self.module(plan.head)
            return Model(
                self.spec, embedding, layers, residual, head, self.tables, self.policy.activations, self.choices
            )

    def module(self, node: Node) -> nn.Module:
        """A part's module; position parts are shared, since they hold no state."""
        if node.slot != "position":
            return self._implemented(node)
        key = (node.part, node.site.width)
        if key not in self._positions:
            module: Any = self._implemented(node)
            name = f"{node.part.name}/{node.site.width}"
            while name in self.tables:
                name += "'"
            module.key = name
            self._positions[key] = self.tables[name] = module
        return self._positions[key]  # type: ignore[no-any-return]

    def linear(self, role: str, declared: Linear) -> nn.Module:
        owner = role.rpartition(".")[0]
        weights = [self.tensor(join(owner, w.name), w, role, declared.sensitive) for w in declared.weights]
        module: nn.Module = self.policy.linear(role, declared, weights[0], weights[1] if declared.bias else None)
        return module

    def tensor(self, name: str, weight: Weight, role: str | None = None, sensitive: bool = True) -> Tensor:
        """The meta tensor of a declared name; an alias is the very tensor it names.

        `role` and `sensitive` are those of the linear map it belongs to; a plain weight has no role.
        """
        if weight.same_as is not None:
            if weight.same_as not in self._tensors:
                raise TypeError(f"{name} is declared the same as {weight.same_as}, which is not built before it")
            return self._tensors[weight.same_as]
        if name not in self._tensors:
            stored = weight.dtype or self.policy.config.format(role or name, weight, sensitive).storage
            empty = torch.empty(weight.shape, dtype=DTYPES[stored], device="meta")
            self._tensors[name] = nn.Parameter(empty) if weight.trains else nn.Buffer(empty)
        return self._tensors[name]

    def _implemented(self, node: Node) -> nn.Module:
        site = TensorSite(node, self)
        chosen = {phase: self._choose(node, phase) for phase in PHASES}
        self.choices[node.path] = {phase: implementation.name for phase, implementation in chosen.items()}
        owner_class = lazy.load(chosen["train"].module)
        owner: nn.Module = owner_class(node.part.config, site)
        site.check()
        others = {p: lazy.load(i.module) for p, i in chosen.items()}
        if len(set(others.values())) > 1:
            owner.__dict__["forward"] = _Dispatch(owner, others)
        return owner

    def _choose(self, node: Node, phase: Phase) -> Implementation:
        offered = [i for i in node.part.component.implementations if phase in i.phases]
        facts = Facts(config=node.part.config, site=node.site, phase=phase, device=self.device, dtype=str(self.policy.activations))
        wanted = node.stated.chosen(phase)
        reasons = {i.name: i.needs(facts) if i.needs else None for i in offered}
        if wanted != "auto":
            chosen = next(i for i in offered if i.name == wanted)
            if reasons[wanted] is not None:
                raise SpecError([Problem(join(node.path, "implementation"), wanted, f"can not serve here: {reasons[wanted]}")])
            return chosen
        for implementation in offered:
            if reasons[implementation.name] is None:
                return implementation
            log.info("%s: %s falls back from %s: %s", node.path, phase, implementation.name, reasons[implementation.name])
        raise SpecError([Problem(node.path, node.part.kind, f"no implementation serves {phase}: {reasons}")])


class _Dispatch:
    """A module's forward when phases are served by different implementations over one state."""

    def __init__(self, owner: nn.Module, classes: Mapping[Phase, type[nn.Module]]) -> None:
        self._views: dict[Phase, tuple[type[nn.Module], nn.Module]] = {}
        for phase, cls in classes.items():
            view = owner
            if cls is not type(owner):
                view = object.__new__(cls)
                view.__dict__ = owner.__dict__
            self._views[phase] = (cls, view)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        phase: Phase = next((a.phase for a in (*args, *kwargs.values()) if hasattr(a, "phase")), "train")
        cls, view = self._views[phase]
        return cls.forward(view, *args, **kwargs)


def build(
    spec: "str | Spec | Any",
    *,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    overrides: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A model with initial values, from a spec, its path or its shipped name.

    On the device `meta` it has shapes only. A `dtype` where the spec states no precision means `full` in it.
    `progress(done, total)` counts tensors.
    """
    model = skeleton(Spec.load(spec, tuple(overrides)), device=device, dtype=dtype)
    if device != "meta":
        tensors = model.spec.plan.tensors
        std = model.spec.model.init_std
        fill(model, ((name, initial(name, weight, seed, std)) for name, weight in tensors.items()), device, progress)
    return model


def skeleton(spec: Spec, *, device: str = "cpu", dtype: str | None = None) -> Model:
    """The model on the meta device, with implementations chosen for `device`. Values come from `fill`."""
    if dtype is not None:
        if dtype not in ("float64", "float32", "bfloat16", "float16"):
            raise InputError(f"dtype = {dtype}: must be one of float64, float32, bfloat16, float16")
        if "precision" not in spec.document.data:
            spec = spec.with_(precision={"kind": "full", "dtype": dtype})
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"device = {device}: no such device; cpu, cuda, cuda:0 and meta are some") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device = {device}: this machine, or this build of PyTorch, has no CUDA device")
    model = Builder(spec, spec.single("precision"), kind).model()
    _agree(model, spec)
    return model


def fill(
    model: nn.Module,
    values: Iterable[tuple[str, Tensor]],
    device: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Gives every parameter and buffer its value, on `device` and in the model's dtype; aliases stay aliases."""
    places = _places(model)
    names = {name: key for key, (_, owners) in places.items() for name, _, _ in owners}
    total, done = len(places), 0
    for name, value in values:
        old, owners = places.pop(names[name])
        if tuple(value.shape) != tuple(old.shape):
            raise InputError(f"{name}: has shape {tuple(value.shape)}, the model wants {tuple(old.shape)}")
        data = value.to(device=device, dtype=old.dtype)
        new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
        for _, module, attribute in owners:
            setattr(module, attribute, new)
        done += 1
        if progress is not None:
            progress(done, total)
    if places:
        raise InputError("no value given for " + ", ".join(owners[0][0] for _, owners in places.values()))


def _places(model: nn.Module) -> dict[int, tuple[Tensor, list[tuple[str, nn.Module, str]]]]:
    """Every distinct tensor with all the places it stands in: full name, module, attribute."""
    places: dict[int, tuple[Tensor, list[tuple[str, nn.Module, str]]]] = {}
    for path, module in model.named_modules():
        own: Iterator[tuple[str, Tensor | None]] = iter([*module._parameters.items(), *module._buffers.items()])
        for attribute, tensor in own:
            if tensor is not None:
                places.setdefault(id(tensor), (tensor, []))[1].append((join(path, attribute), module, attribute))
    return places


def _agree(model: Model, spec: Spec) -> None:
    """Raises TypeError unless what was built is exactly what was declared."""
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    plan = spec.plan
    declared = {name: weight.shape for node in plan.nodes() for name, weight in node.tensors()}
    if plan.predictor is None and built != declared:
        wrong = sorted(set(built.items()) ^ set(declared.items()))
        raise TypeError(f"built and declared tensors differ: {wrong[:8]}")


__all__ = ["Builder", "Site", "TensorSite", "build", "fill", "skeleton"]
