"""From a plan to modules: every part is constructed on the meta device, then its tensors are given values.

A part's module asks its `TensorSite` for what its config declared; nothing undeclared exists, and nothing
declared may be left out. Values come later, by name: initial ones, or a folder's.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor, nn

from composeformer import lazy
from composeformer.agreement import agree
from composeformer.blame import blame, described
from composeformer.config import facts_of
from composeformer.contracts import Linear, Part, Phase, Weight
from composeformer.decoder import Layer, Model
from composeformer.errors import InputError, PluginError, join, one_of
from composeformer.exchange import Exchange
from composeformer.filling import fill
from composeformer.implementations import Chooser, serve
from composeformer.init import initial
from composeformer.parallel import Placement, place
from composeformer.plan import Node
from composeformer.policy import Codec, Policy
from composeformer.site import Site
from composeformer.spec import Spec
from composeformer.tensors import DTYPES

T = TypeVar("T")


class TensorSite:
    """A site with tensors: what a part's module is constructed with, beside its config.

    Each declared name is taken once, by the method of its sort; PluginError says what a module did wrong.
    """

    def __init__(self, node: Node, builder: "Builder") -> None:
        self._node = node
        self._builder = builder
        self._taken: set[str] = set()
        site = node.site
        self.path, self.slot, self.layer, self.width = site.path, site.slot, site.layer, site.width
        self.spec, self.sublayers, self.sizes = site.spec, site.sublayers, site.sizes
        self.hidden_size, self.num_layers = site.hidden_size, site.num_layers

    def linear(self, name: str) -> Any:
        """The linear map declared as `name`, as the precision policy computes it."""
        return self._builder.linear(self.path, self._take(name, self._node.linears, "linear map"))

    def weight(self, name: str) -> Any:
        """The tensor declared as `name`: a parameter, or a buffer if it does not train."""
        declared = self._take(name, self._node.weights, "weight")
        return self._builder.tensors(join(self.path, name), declared)[0]

    def part(self, name: str) -> Any:
        """The module of the part declared as `name`."""
        return self._builder.module(self._take(name, self._node.children, "part"))

    @property
    def comm(self) -> Exchange:
        """What moves tokens to the groups of linear maps that this part declares, and back."""
        groups = {each.groups for each in self._node.linears.values() if each.shard == "group"}
        if len(groups) != 1:
            raise PluginError(f'{self} exchanges tokens but declares no linear maps with shard = "group"')
        return self._builder.exchange(groups.pop() or 1)

    def shared(self, slot: str) -> "Shared":
        """The model's own `embedding` or `head`, to be called; its tensors stay where they are."""
        return Shared(self._builder.ends[slot])

    def replicated(self, x: Tensor) -> Tensor:
        """`x`, which every process holds and local heads read; its gradients are summed over processes."""
        return x

    def check(self) -> None:
        """Raises PluginError where the module left something declared untaken."""
        declared = {*self._node.linears, *self._node.weights, *self._node.children}
        if missing := declared - self._taken:
            raise PluginError(f"{self} declares {one_of(sorted(missing))} but takes none of that name")

    def __str__(self) -> str:
        return described(self.spec.registry, self._node.part, self.path)

    def _take(self, name: str, declared: Any, sort: str) -> Any:
        if name not in declared:
            raise PluginError(
                f"{self} takes a {sort} {name!r} but declares none; declared: {one_of(declared)}"
            )
        if name in self._taken:
            raise PluginError(f"{self} takes its {sort} {name!r} twice")
        self._taken.add(name)
        return declared[name]


class Shared:
    """A module that belongs to another place in the model: called here, registered there."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)


class Builder:
    """Constructs one model on the meta device, with implementations for a `device` type: what this process holds of
    it, as its placement says.
    """

    def __init__(self, spec: Spec, device: str, placement: Placement | None = None) -> None:
        self.spec = spec
        self.placement = Placement(spec=spec) if placement is None else placement
        self.formats = spec.formats
        self.chooser = Chooser(device, self.formats.activations)
        self.activations = DTYPES[self.formats.activations]
        self._policies: dict[int, Policy] = {}
        self._comm: Any = None
        self.choices: dict[str, dict[Phase, str]] = {}
        self.ends: dict[str, nn.Module] = {}
        self.tables: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._positions: dict[tuple[object, ...], Any] = {}

    def model(self) -> Model:
        """The model. Raises PluginError where a module fails or is not what its config declares, or SpecError where no
        implementation serves a part.
        """
        plan = self.spec.plan
        with torch.device("meta"):
            embedding = self.module(plan.embedding)
            layers = []
            for nodes in plan.layers:
                parts = {slot: self.module(node) for slot, node in nodes.items()}
                layers.append(Layer(parts.get("mixer"), parts.get("ffn"), parts["residual"]))
            residual, head = self.module(plan.residual), self.module(plan.head)
            self.ends = {"embedding": embedding, "head": head}
            predictor = None if plan.predictor is None else self.module(plan.predictor)
            ends = embedding, layers, residual, head, predictor
            model = Model(self.spec, *ends, self.tables, self.activations, self.choices)
        model.placement = self.placement
        agree(model, self.formats)
        if self.placement.shard:
            lazy.load("composeformer.parallel.sharding:shard")(model, self.placement)
        return model

    def module(self, node: Node) -> nn.Module:
        """A part's module; position parts are shared, since they hold no state."""
        if node.slot != "position":
            return self._implemented(node)
        if node.linears or node.weights:
            raise TypeError(f"position {node.part.kind} declares tensors; a position is shared and has none")
        key = (node.part, node.stated.implementation, node.site.width)
        if key not in self._positions:
            module: Any = self._implemented(node)
            name = f"{node.part.name}/{node.site.width}"
            while name in self.tables:
                name += "'"
            module.key = name
            self._positions[key] = self.tables[name] = module
        return self._positions[key]  # type: ignore[no-any-return]

    def exchange(self, groups: int) -> Exchange:
        """The communication backend for a part with this many groups."""
        part = self.spec.single("comm")
        with blame(self.spec.registry, part, "comm", "its exchange"):
            if self._comm is None:
                self._comm = lazy.load(self._run_part(part))
            made: Exchange = self._comm(part.config, groups, self.placement.world.expert_group)
            _has(made, "exchange", "dispatch", "combine", "ledger")
        return made

    def linear(self, owner: str, declared: Linear) -> nn.Module:
        """The map that the precision policy, or that of a rule, makes of a declared one.

        Raises PluginError, which names that policy, where it fails or gives no `PolicyLinear`.
        """
        role = join(owner, declared.name)
        weight, *scales = self.tensors(join(owner, declared.weight.name), declared.weight)
        bias = None
        if declared.bias:
            (bias,) = self.tensors(join(owner, declared.weights[1].name), declared.weights[1])
        named = self.formats.rule(role) is not None
        # Parts expect other dtypes of sensitive maps, and of no others.
        dtype = self.activations if named and not declared.sensitive else None
        told = self.placement.linear(attrs.evolve(declared, sensitive=declared.sensitive and not named))
        part = self.formats.decides(role)
        with blame(self.spec.registry, part, role, "its linear map"):
            module: nn.Module = self._policy(part).linear(role, told, weight, bias, scales=scales, dtype=dtype)  # type: ignore[arg-type]
            _has(module, "weight", "bias", "dtype", "matrix")
        return module

    def tensors(self, name: str, weight: Weight) -> list[Tensor]:
        """The meta tensors that hold what is declared as `name`: one, or codes and scales; an alias has those of the
        very tensor it names.
        """
        stored = self.formats.stored
        target = weight.same_as or name
        held = self.formats.coded.get(target, (target,))
        if weight.same_as is not None and held[0] not in self._tensors:
            raise TypeError(f"{name} is declared to be {target}, which is not built before it")
        for each in held:
            if each not in self._tensors:
                here = self.placement.here(each, stored[each])
                empty = torch.empty(here.shape, dtype=DTYPES[str(here.dtype)], device="meta")
                self._tensors[each] = nn.Parameter(empty) if here.trains else nn.Buffer(empty)
        return [self._tensors[each] for each in held]

    def _policy(self, part: Part) -> Policy:
        """The policy of a precision part; made once."""
        if id(part) not in self._policies:
            self._policies[id(part)] = lazy.load(self._run_part(part))(part.config)
        return self._policies[id(part)]

    def _run_part(self, part: Part) -> str:
        """The dotted name of what serves a part that the model has one of, and that never learns the phase."""
        site = Site(
            path=part.slot, slot=part.slot, layer=None, width=self.spec.model.hidden_size, spec=self.spec
        )
        return self.chooser.choose(part, part.config, site)["train"].module

    def _implemented(self, node: Node) -> nn.Module:
        chosen = self.chooser.choose(node.stated, node.part.config, node.site)
        self.choices[node.path] = {phase: implementation.name for phase, implementation in chosen.items()}
        site = TensorSite(node, self)
        with blame(self.spec.registry, node.part, node.path, "its module"):
            classes = {phase: lazy.load(implementation.module) for phase, implementation in chosen.items()}
            owner: nn.Module = classes["train"](node.part.config, site)
            site.check()
        serve(owner, classes)
        return owner


def _has(made: object, *names: str) -> None:
    """Raises TypeError where what a plugin made lacks what is asked of it."""
    if missing := [each for each in names if not hasattr(made, each)]:
        raise TypeError(f"a {type(made).__name__} has no {one_of(missing)}")


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

    On the device `meta` it has shapes only. A `dtype` puts the default precision policy, in it, in place of the
    spec's. `progress(done, total)` counts tensors. Over several processes each builds what it holds, of
    the same values for the same seed. Raises ComposeError.
    """
    model = skeleton(Spec.load(spec, tuple(overrides)), device=device, dtype=dtype)
    groups = model.placement.groups
    model.placement.world.agree({"the seed": str(seed)}, "build one model")
    if torch.device(device).type != "meta":
        tensors = model.spec.plan.tensors.items()
        std = model.spec.model.init_std
        values = ((name, initial(name, weight, seed, std, groups(name))) for name, weight in tensors)
        fill(model, coded(model.spec, values), device, progress)
    return model


def skeleton(spec: Spec, *, device: str = "cpu", dtype: str | None = None) -> Model:
    """The model on the meta device, with implementations chosen for `device`. Values come from `fill`. Over several
    processes it is what this one holds.

    Raises InputError for a device that is not there, or a `dtype` that the precision policy can not have.
    """
    if dtype is not None:
        spec = in_dtype(spec, dtype)
    kind = device_type(device)
    return Builder(spec, kind, place(spec, device)).model()


def in_dtype(spec: Spec, dtype: str) -> Spec:
    """The spec in one dtype: that of the default precision policy, whatever policy and rules it states.

    Raises InputError where that policy has no such dtype.
    """
    default = spec.registry.default("precision")
    fact = None if default is None else facts_of(default.config).get("dtype")
    if default is None or fact is None:
        raise InputError(f"dtype = {dtype}: no precision policy here is of one dtype; set `precision` instead")
    if fact.choices is not None and dtype not in fact.choices:
        raise InputError(f"dtype = {dtype}: must be one of {one_of(str(choice) for choice in fact.choices)}")
    # Under its own kind a policy keeps what is not set anew.
    rules: dict[str, Any] = {"rules": []} if spec.formats.rules else {}
    return spec.with_(precision={"kind": default.kind, "dtype": dtype, **rules})


def device_type(device: str) -> str:
    """The type of a device that is there. Raises InputError for any other."""
    try:
        found = torch.device(device)
    except RuntimeError:
        told = "no such device; cpu, cuda, cuda:0 and meta are some"
        raise InputError(f"device = {device}: {told}") from None
    if found.type in ("cpu", "meta"):
        return found.type
    backend = getattr(torch, found.type, None)
    if backend is None or not hasattr(backend, "is_available") or not backend.is_available():
        told = f"this machine, or this build of PyTorch, has no {found.type} device"
        raise InputError(f"device = {device}: {told}")
    count = backend.device_count()
    if found.index is not None and found.index >= count:
        raise InputError(f"device = {device}: there are {count}, numbered from 0")
    return found.type


def coded(spec: Spec, values: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same values in the form that the spec's formats store them in: what has a codec is encoded by it."""
    formats = spec.formats
    made: dict[str, Codec] = {}
    for name, value in values:
        held = formats.coded.get(name)
        if held is None or value.dtype == DTYPES[str(formats.stored[name].dtype)]:
            yield name, value
            continue
        kind = str(formats.tensors[name].codec)
        component = spec.registry.get("codec", kind)
        try:
            with blame(spec.registry, component, name, "its codes"):
                if kind not in made:
                    made[kind] = lazy.load(component.implementations[0].module)(component.config())
                parts = made[kind].encode(value)
                given = [str(each.dtype).removeprefix("torch.") for each in parts]
                wanted = [str(formats.stored[each].dtype) for each in held]
                if given != wanted:
                    raise TypeError(f"encode gives {one_of(given)}, stored declares {one_of(wanted)}")
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        yield from zip(held, parts, strict=True)


__all__ = ["Builder", "Site", "TensorSite", "build", "coded", "fill", "skeleton"]
