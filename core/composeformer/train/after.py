"""Work after an optimizer step: what a part does once per step that happened, outside autograd.

A module with a method `after_step(totals, run)` is called with its own counts, summed in integers over the
step's micro-batches (a router's loads, from which it moves its balancing bias).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from composeformer.errors import join
from composeformer.tensors import Aux

# What wrappers around a module add to the names of what they hold.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@attrs.frozen(kw_only=True)
class Run:
    """Where a run is, as one part sees it: the step, counted from 0, its real tokens, the part's fields."""

    step: int
    tokens: int
    path: str
    config: Any
    values: Mapping[str, float] = attrs.field(repr=False, factory=dict)

    def value(self, field: str) -> Any:
        """A field of the part's config, as scheduled if it is. Raises AttributeError for an unknown one."""
        scheduled = self.values.get(join(self.path, field))
        return getattr(self.config, field) if scheduled is None else scheduled


def add_counts(totals: dict[str, Tensor], aux: Aux) -> None:
    """Adds a forward's counts to `totals`, by dotted path. Raises TypeError for one that is not int64."""
    for path, count in aux.counts.items():
        if count.dtype != torch.int64:
            raise TypeError(f"{path}: counts are int64, found {count.dtype}")
        totals[path] = totals[path] + count if path in totals else count.detach()


@torch.no_grad()
def after_step(model: nn.Module, totals: Mapping[str, Tensor], run: Run) -> dict[str, float]:
    """Calls `after_step` of every module that has it, once, in the order of the model.

    `run` is the whole model's. Each part gets its own, and of `totals` what lies below its path, named from
    there. Returns the metrics that they give, scalar tensors by name, by dotted path; read from the device at
    once.
    """
    # A wrapper shows the methods of what it holds; of one path the innermost module counts, once.
    modules = {
        path_of(name): module
        for name, module in model.named_modules()
        if name and hasattr(module, "after_step")
    }
    if not modules:
        return {}
    spec = getattr(model, "spec", None)
    configs = {} if spec is None else {node.path: node.part.config for node in spec.plan.nodes()}
    told: dict[str, Tensor] = {}
    for path, module in modules.items():
        work: Any = module.after_step
        given = work(_below(path, totals.items()), attrs.evolve(run, path=path, config=configs.get(path)))
        told |= {join(path, name): value for name, value in (given or {}).items()}
    if not told:
        return {}
    return dict(zip(told, torch.stack([value.double() for value in told.values()]).tolist(), strict=True))


def path_of(name: str) -> str:
    """A module's or a parameter's dotted path from its name in torch, wrappers left out."""
    return ".".join(step for step in name.split(".") if step not in WRAPPERS)


def _below(path: str, totals: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{path}."): count for name, count in totals if name.startswith(f"{path}.")}
