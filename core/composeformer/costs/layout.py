"""Which device holds what of a model that is trained over many: stages, experts, replicas.

Devices are numbered so that those that share a linear map are neighbours, then those that share experts and replicas,
then stages. A stage holds consecutive layers, as many as the others or one more; the embedding is in the first, the
head and a predictor in the last, with a copy of the embedding where the predictor or a tied head needs it.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property

import attrs

from composeformer.contracts import Linear, Weight
from composeformer.errors import InputError
from composeformer.plan import Node
from composeformer.spec import Spec


@attrs.frozen(kw_only=True)
class Held:
    """A tensor as one device holds it: `elements` of it, of which `replicas` devices hold the same."""

    name: str
    weight: Weight
    elements: float
    replicas: int


@attrs.frozen(kw_only=True, eq=False)
class Layout:
    """A model over `devices`. Raises InputError where they can not be divided so."""

    spec: Spec
    devices: int

    @property
    def pipeline(self) -> int:
        return self.spec.parallel.pipeline

    @property
    def tensor(self) -> int:
        return self.spec.parallel.tensor

    @property
    def expert(self) -> int:
        return self.spec.parallel.expert

    @property
    def zero(self) -> int:
        """What replicas share: 1 the optimizer's state, 2 gradients too, 3 weights too."""
        stated = self.spec.parallel.zero
        return stated if stated is not None else 3 if self.spec.parallel.shard else 0

    @property
    def stage_devices(self) -> int:
        return self.devices // self.pipeline

    @property
    def data(self) -> int:
        """Replicas of what is no expert: devices of a stage with tokens of their own."""
        return self.stage_devices // self.tensor

    def check(self) -> None:
        """Raises InputError, a line for what does not divide what."""
        layers, whole = len(self.spec.layers), self.pipeline * self.tensor
        if self.pipeline > layers:
            raise InputError(
                f"parallel.pipeline = {self.pipeline}: must be <= the number of layers ({layers})"
            )
        if self.spec.parallel.schedule == "dualpipe" and self.pipeline > 1 and self.pipeline % 2:
            # A device is a stage of both directions, from either end (arXiv 2412.19437, section 3.2.1).
            told = "must be even under the schedule dualpipe"
            raise InputError(f"parallel.pipeline = {self.pipeline}: {told}")
        if self.devices % whole:
            told = f"must divide the number of devices ({self.devices})"
            raise InputError(f"parallel.pipeline x parallel.tensor = {whole}: {told}")
        if self.stage_devices % self.expert:
            told = f"must divide the devices of a stage ({self.stage_devices})"
            raise InputError(f"parallel.expert = {self.expert}: {told}")
        for role, linear in self.spec.plan.linears.items():
            cut = {"out": linear.outputs, "in": linear.inputs}.get(linear.shard or "")
            if self.tensor > 1 and cut is not None and (cut // linear.unit) % self.tensor:
                told = f"must divide the {cut // linear.unit} units of {role}"
                raise InputError(f"parallel.tensor = {self.tensor}: {told}")

    @cached_property
    def stages(self) -> tuple[tuple[Node, ...], ...]:
        """The nodes of each stage, without what is below them."""
        plan = self.spec.plan
        count, over = divmod(len(plan.layers), self.pipeline)
        stages: list[list[Node]] = []
        first = 0
        for index in range(self.pipeline):
            last = first + count + (index < over)
            stages.append([node for layer in plan.layers[first:last] for node in layer.values()])
            first = last
        stages[0].insert(0, plan.embedding)
        stages[-1] += [plan.residual, plan.head]
        stages[-1] += [] if plan.predictor is None else [plan.predictor]
        return tuple(tuple(stage) for stage in stages)

    def device_stages(self, stage: int) -> tuple[int, ...]:
        """The stages whose weights a device of this one holds: under DualPipe those of both directions."""
        both = self.spec.parallel.schedule == "dualpipe" and self.pipeline > 1
        return (stage, self.pipeline - 1 - stage) if both else (stage,)

    @cached_property
    def holders(self) -> Mapping[str, int]:
        """Of every tensor, how many devices of different stages hold it. Under DualPipe the first and the last stage
        are on the same, and what they share is there once (arXiv 2412.19437, section 3.2.3).
        """
        found: dict[str, set[int]] = {}
        for stage in range(self.pipeline):
            for held in self.held(stage):
                found.setdefault(held.name, set()).add(min(self.device_stages(stage)))
        return {name: len(stages) for name, stages in found.items()}

    def held(self, stage: int) -> tuple[Held, ...]:
        """Every tensor of a stage, as one of its devices holds it; what it shares with another stage as a copy."""
        return self._held_by_stage[stage]

    @cached_property
    def _held_by_stage(self) -> tuple[tuple[Held, ...], ...]:
        return tuple(tuple(self._walk(stage)) for stage in range(self.pipeline))

    def _walk(self, stage: int) -> Iterator[Held]:
        own: set[str] = set()
        aliases: dict[str, None] = {}
        for top in self.stages[stage]:
            for node in top.walk():
                for name, linear, weight in _tensors(node):
                    if weight.same_as is not None:
                        aliases[weight.same_as] = None
                        continue
                    own.add(name)
                    yield self._held(name, weight, linear)
        if any(node.slot == "predictor" for node in self.stages[stage]):
            # A predictor runs the model's own ends again.
            aliases |= {name: None for name, _, _ in _tensors(self.spec.plan.embedding)}
        for name in aliases:
            if name not in own:
                yield self._held(name, self.spec.plan.tensors[name], None)

    def _held(self, name: str, weight: Weight, linear: Linear | None) -> Held:
        if linear is not None and linear.shard == "group":
            replicas = self.stage_devices // self.expert
            return Held(name=name, weight=weight, elements=weight.elements / self.expert, replicas=replicas)
        bias = linear is not None and weight.name == f"{linear.name}.bias"
        cut = weight.shard is not None
        if linear is not None:
            cut = linear.shard == "out" or (linear.shard == "in" and not bias)
        shared = self.tensor if cut else 1
        # What is not cut is the same on all devices of a stage.
        replicas = self.stage_devices // shared
        return Held(name=name, weight=weight, elements=weight.elements / shared, replicas=replicas)


def layout(spec: Spec) -> Layout:
    """The layout that `[parallel]` and `cost.gpus` say; on as few devices as it takes where none are stated.

    Raises InputError where it can not be.
    """
    parallel = spec.parallel
    cost = spec.document.data.get("cost")
    stated = isinstance(cost, dict) and "gpus" in cost
    least = parallel.pipeline * parallel.tensor * max(1, parallel.expert // parallel.tensor)
    found = Layout(spec=spec, devices=spec.cost.gpus if stated else least)
    found.check()
    return found


def _tensors(node: Node) -> Iterator[tuple[str, Linear | None, Weight]]:
    by_weight = {id(weight): linear for linear in node.linears.values() for weight in linear.weights}
    for name, weight in node.tensors():
        yield name, by_weight.get(id(weight)), weight
