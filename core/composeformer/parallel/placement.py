"""Which process holds what of a model: the groups of stacked maps by expert group, the rest sharded or whole.

A linear map with `shard = "group"` is a stack of which each process of an expert group holds an equal part, in
order, with its biases, codes and scales. Everything else is told by the parameters themselves.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

import attrs
import torch

from composeformer import lazy
from composeformer.contracts import Linear, Weight
from composeformer.costs.ledger import several
from composeformer.errors import InputError, Problem, SpecError, one_of
from composeformer.manifest import in_words
from composeformer.parallel import world as worlds
from composeformer.parallel.world import ALONE, World
from composeformer.plugins import current

if TYPE_CHECKING:
    from torch import nn

    from composeformer.spec import Spec

log = logging.getLogger(__name__)


@attrs.frozen(kw_only=True, eq=False)
class Placement:
    """One model over the processes of `world`. With `shard` what is no expert is sharded over all of them."""

    spec: "Spec" = attrs.field(repr=False)
    world: World = ALONE
    shard: bool = False

    @cached_property
    def stacks(self) -> Mapping[str, int]:
        """Every tensor that is cut by group, declared or stored, by full name: the number of its groups."""
        if self.world.experts == 1:
            return {}
        found = {}
        formats = self.spec.formats
        for role, linear in self.spec.plan.linears.items():
            if linear.shard != "group" or linear.groups is None:
                continue
            for name in (f"{role}.weight", f"{role}.bias"):
                for held in (name, *formats.coded.get(name, ())):
                    found[held] = linear.groups
        return found

    @property
    def spread(self) -> bool:
        """Whether a forward pass needs other processes."""
        return self.shard or bool(self.stacks)

    def groups(self, name: str) -> slice | None:
        """The groups of a tensor that this process holds; None: all there is."""
        number = self.stacks.get(name)
        if number is None:
            return None
        each = number // self.world.experts
        return slice(self.world.expert_rank * each, (self.world.expert_rank + 1) * each)

    def here(self, name: str, weight: Weight) -> Weight:
        """A declared or stored tensor as this process holds it, before sharding."""
        part = self.groups(name)
        if part is None:
            return weight
        return attrs.evolve(weight, shape=(part.stop - part.start, *weight.shape[1:]))

    def linear(self, declared: Linear) -> Linear:
        """A declared linear map as this process holds it, before sharding."""
        if declared.shard != "group" or declared.groups is None:
            return declared
        return attrs.evolve(declared, groups=declared.groups // self.world.experts)

    def syncs(self, model: "nn.Module", last: bool) -> None:
        """Whether the next backward pass sums gradients of shards over processes: that of a step's last micro-batch."""
        if self.shard:
            lazy.load("composeformer.parallel.sharding:syncs")(model, last)

    def gathered(self, *units: "nn.Module") -> AbstractContextManager[None]:
        """What units (layers, the predictor, the model) have themselves is whole in it: for calls that are no forward
        of theirs. Every process enters it.
        """
        if not self.shard:
            return nullcontext()
        found: AbstractContextManager[None] = lazy.load("composeformer.parallel.sharding:gathered")(*units)
        return found


def place(spec: "Spec", device: str = "cpu") -> Placement:
    """Where a model of this spec goes: over the processes that met; those that torchrun started meet now.

    Raises SpecError for numbers of processes that do not fit or a `comm` that can not, InputError where processes
    can not meet, or differ in what they are about to build.
    """
    worlds.start(device)
    size, wanted = worlds.size(), spec.parallel.expert
    if size == 1:
        if wanted > 1:
            log.info("parallel.expert = %d: there is one process, which holds all experts", wanted)
        return Placement(spec=spec)
    if torch.device(device).index is not None:
        told = "each of several processes has a device of its own; name the kind alone"
        raise InputError(f"device = {device}: {told}")
    world = worlds.world(wanted, device)
    # What one of them alone would refuse, the others would wait for.
    world.agree(_digest(spec), "build one model")
    if problems := list(_problems(spec, size)):
        raise SpecError(problems)
    return Placement(spec=spec, world=world, shard=spec.parallel.shard)


def _problems(spec: "Spec", size: int) -> Iterator[Problem]:
    """Why a spec can not be run by so many processes."""
    for name in ("pipeline", "tensor"):
        found = getattr(spec.parallel, name)
        if found > 1:
            told = "is priced, and not run by this version; 1 runs"
            yield Problem(f"parallel.{name}", found, told).at(spec.document.source(("parallel", name)))
    experts = spec.parallel.expert
    if size % experts:
        told = f"must divide the number of processes, {size}"
        yield Problem("parallel.expert", experts, told).at(spec.document.source(("parallel", "expert")))
    if experts == 1 or not any(one.shard == "group" for one in spec.plan.linears.values()):
        return
    comm = spec.single("comm")
    if not several(comm.config):
        registry = spec.registry
        able = [kind for kind in registry.kinds("comm") if several(registry.get("comm", kind).config)]
        told = f"moves tokens within one process, and parallel.expert is {experts}; several need {one_of(able)}"
        stated = "comm" in spec.document.data
        yield Problem("comm.kind", comm.kind, told).at(spec.document.source(("comm",)) if stated else None)


def _digest(spec: "Spec") -> dict[str, str]:
    """What processes that build one model must have in common, by name."""
    return {
        "their plugins": "\n".join(map(in_words, current().manifest())),
        "the spec": spec.to_toml(),
        "the spec's fingerprint": spec.fingerprint,
    }

