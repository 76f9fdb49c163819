"""Laws of whole models over processes: what two do together is what one does, whoever holds the experts and shards."""

import copy
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from composeformer.assemble import build
from composeformer.config import facts_of
from composeformer.costs.ledger import several
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.parallel.pieces import is_shard, local
from composeformer.rounding import Carried, Operand
from composeformer.spec import Spec
from composeformer.testing.laws.model_rows import row_of
from composeformer.testing.laws.model_steps import descent, told
from composeformer.testing.models import GRADIENT, ModelCase, model_law
from composeformer.testing.ranks import on_ranks
from composeformer.testing.tables import tables
from composeformer.train import TokenBatch, train_step, trainer

SIZE = 2


class Held(NamedTuple):
    """A tensor as one process holds it: `how` is whole, by expert, or a shard."""

    how: str
    value: Tensor


def spread(case: ModelCase) -> Spec:
    """The spec over two processes: sharded or not, with experts apart or not, by any exchange that serves several.

    What an exchange rounds is a law of its slot; here nothing is rounded on the way.
    """
    parallel = {"expert": case.choice("expert", [2, 1, 2]), "shard": case.boolean("shard")}
    data = {key: value for key, value in case.spec.to_dict().items() if key != "comm"} | {
        "parallel": parallel
    }
    able = {each.kind: each for each in case.tried.registry if each.slot == "comm" and several(each.config)}
    try:
        if not able:
            return case.spec_of(data)
        component = able[case.choice("comm", sorted(able))]
        table = case.draw("its table", tables(component))
        facts = facts_of(component.config)
        needed = {key: each for key, each in table.items() if key == "kind" or facts[key].required}
        for each in (table, needed):
            found = case.spec_of({**data, "comm": each})
            if not _rounds(found):
                return found
    except SpecError as error:
        case.draw.reject(str(error.problems[0]))
    case.draw.reject(f"{component.kind} rounds what it carries")


def _rounds(spec: Spec) -> bool:
    """Whether the exchange declares that it moves what it carries."""
    config: Any = spec.single("comm").config
    told = config.rounding(spec.parallel.expert) if hasattr(config, "rounding") else Carried()
    return bool((told.dispatch, told.combine) != (Operand(), Operand()))


def brought(
    model: Model, batches: Sequence[TokenBatch], clip: float | None
) -> tuple[dict[str, Tensor], dict[str, Held]]:
    """What a step tells, and the gradients, weights and buffers that it leaves in this process."""
    objective, _ = trainer(model)
    result = train_step(model, batches, objective, descent(model), step=0, clip_norm=clip)
    tensors = {f"{GRADIENT}{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    tensors |= {f"after {name}": each for name, each in model.state_dict().items()}

    def how(name: str, tensor: Tensor) -> str:
        if is_shard(tensor):
            return "shard"
        plain = name.removeprefix(GRADIENT).removeprefix("after ")
        return "whole" if model.placement.groups(plain) is None else "expert"

    return told(result), {n: Held(how(n, t), local(t.detach()).clone()) for n, t in tensors.items()}


def joined(case: ModelCase, parts: Sequence[dict[str, Held]], experts: int) -> dict[str, Tensor]:
    """What processes hold, as one would; what several hold must be the same bits."""
    for part in parts[1:]:
        case.equal(sorted(part), sorted(parts[0]), "the names of what a process holds")
    found = {}
    for name, first in parts[0].items():
        values = [part[name].value for part in parts]
        if first.how == "shard":
            found[name] = torch.cat(values)
            continue
        apart = experts if first.how == "expert" else 1
        for rank, value in enumerate(values):
            case.equal(value, values[rank % apart], f"{name} in process {rank}")
        found[name] = torch.cat(values[:apart]) if apart > 1 else values[0]
    return found


def readied() -> None:
    """Imports what ranks would import after the fork, each for itself: PyTorch's compiler, which shards load."""
    for name in ("torch._dynamo", "torch.distributed.tensor", "composeformer.parallel.sharding"):
        import_module(name)


@model_law(
    "processes",
    "two processes with rows of their own make the step of one with all: losses, gradients, counts, weights, buffers",
    kills="gradients-are-averaged-over-processes",
    examples=4,
)
def processes(case: ModelCase) -> None:
    spec, batch = spread(case), case.rows("rows", rows=(2, 4))
    clip = case.choice("clip_norm", [None, 0.01])
    if not case.objective.weight(batch.seen()):
        case.draw.reject("no token has a label")
    cut = case.integer("cut", 1, len(batch.ids) - 1)
    pieces = [row_of(batch, range(cut)), row_of(batch, range(cut, len(batch.ids)))]
    seed = case.integer("seed of both", 0, 2**16)
    one = build(case.spec, seed=seed)

    def alone(model: Model) -> dict[str, Tensor]:
        results, held = brought(copy.deepcopy(model), pieces, clip)
        return {**results, **{name: each.value for name, each in held.items()}}

    wanted = case.measure(alone, one, case.error_in(torch.float64))

    def rank(number: int) -> tuple[dict[str, Tensor], dict[str, Held]]:
        return brought(build(spec, seed=seed), [pieces[number]], clip)

    readied()
    every = on_ranks(SIZE, rank)
    case.same(every[1][0], every[0][0], "what two processes tell of a step")
    found = {**every[0][0], **joined(case, [held for _, held in every], spec.parallel.expert)}
    case.agree(found, wanted, "two processes")
