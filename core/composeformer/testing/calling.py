"""Calling a part as its slot is called, whatever the slot: one tensor in, one tensor out.

Shapes: B rows, T tokens, D features; what enters an embedding or a predictor are token ids.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from composeformer.contracts import Phase
from composeformer.decoder import Model
from composeformer.plan import Node
from composeformer.tensors import Batch, Routing
from composeformer.testing.case import Case
from composeformer.testing.mixing import length
from composeformer.testing.subject import Subject

Call = Callable[[Case, Model, Tensor, Batch], Tensor]
ROWS, TOKENS = 2, 7
# Tokens that further ones are predicted from.
AHEAD = 8


def _hidden(case: Case, model: Model, x: Tensor, batch: Batch) -> Tensor:
    found: Tensor = case.part_of(model)(x, batch).hidden
    return found


def _plain(case: Case, model: Model, x: Tensor, batch: Batch) -> Tensor:
    found: Tensor = case.part_of(model)(x)
    return found


def _weights(case: Case, model: Model, x: Tensor, batch: Batch) -> Tensor:
    """Each expert's weight (B, T, E), zero where it is not chosen: in any order of choice."""
    routing = case.part_of(model)(x, batch)
    experts = case.node.site.sizes["num_experts"]
    placed = torch.zeros(*routing.weights.shape[:-1], experts + 1, dtype=routing.weights.dtype)
    return (
        placed.scatter_add(-1, routing.indices.long(), routing.weights)[..., :experts]
        + x[..., :1].to(placed) * 0
    )


def _rotated(case: Case, model: Model, x: Tensor, batch: Batch) -> Tensor:
    position = case.part_of(model)
    found: Tensor = position.rotate(x[:, :, None], position(batch.positions))[:, :, 0]
    return found


def _layer(case: Case, model: Model, x: Tensor, batch: Batch) -> Tensor:
    layer = model.layers[case.node.site.layer or 0]
    found: Tensor = model.residual.close(layer(model.residual.open(x), batch).hidden)
    return found


def _predictions(case: Case, model: Model, ids: Tensor, batch: Batch) -> Tensor:
    predictions = model(ids, predict=True, phase=batch.phase).predictions
    return torch.cat([each.logits.flatten() for each in predictions])


CALLS: dict[str, Call] = {
    "embedding": _plain,
    "head": _plain,
    "mixer": _hidden,
    "ffn": _hidden,
    "router": _weights,
    "norm": _plain,
    "position": _rotated,
    "residual": _layer,
    "predictor": _predictions,
}
OF_IDS = ("embedding", "predictor")


def entered(case: Case) -> tuple[Node, ...]:
    """The parts that a call runs, each with all that is in it."""
    plan = case.spec.plan
    if case.subject.slot == "residual":
        return tuple(plan.layers[case.node.site.layer or 0].values())
    if case.subject.slot == "predictor":
        return tuple(node for node in plan.nodes() if "." not in node.path.removeprefix("layers."))
    return (case.node,)


def uncalled(subject: Subject) -> str | None:
    """Why a part is none that is called with tensors, or None."""
    return None if subject.slot in CALLS else f"a {subject.slot} is no module in a model"


def entering(case: Case) -> Tensor:
    """What enters the part in this case: ids, or hidden states (B, T, D)."""
    if case.subject.slot == "mixer":
        tokens = length(case, "tokens", 2)
    else:
        # Of a predictor every depth is to have some.
        few = AHEAD if case.subject.slot == "predictor" else 2
        tokens = case.integer("tokens", few, few + TOKENS - 2)
    if case.subject.slot in OF_IDS:
        return case.ids("x", ROWS, tokens)
    return case.stream("x", ROWS, tokens)


def call(case: Case, model: Model, x: Tensor, phase: Phase = "train") -> Tensor:
    """What the part gives in a model of the case's spec, its side results aside. Token ids are drawn once a case."""
    ids = x if case.subject.slot in OF_IDS else told_ids(case, x)
    return CALLS[case.subject.slot](case, model, x, model.batch(ids, phase=phase))


def told_ids(case: Case, x: Tensor) -> Tensor:
    """The token ids beside hidden states x."""
    seed = case.draw.values["ids"] if "ids" in case.draw.values else case.integer("ids", 0, 2**16)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(case.spec.model.vocab_size, x.shape[:2], generator=generator)


@contextmanager
def choices(model: Model) -> Iterator[list[bool]]:
    """Within, whether each routing of a model's routers has a token that chose no expert where it might."""
    nobody: list[bool] = []
    hooks = []
    for node in model.spec.plan.nodes():
        if node.slot == "router":

            def hear(
                _: Any, given: Any, routing: Routing, experts: int = node.site.sizes["num_experts"]
            ) -> None:
                nobody.append(bool((routing.indices >= experts).any()))

            hooks.append(model.get_submodule(node.path).register_forward_hook(hear))
    try:
        yield nobody
    finally:
        for hook in hooks:
            hook.remove()
