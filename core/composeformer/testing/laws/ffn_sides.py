"""Laws of what a feed-forward network gives beside its output, in each phase, and of its gradients.

Shapes: B rows, T tokens, D features.
"""

import torch
from torch import Tensor

from composeformer.contracts import PHASES
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.ffn import LONGEST, MOST, settled, transform, value
from composeformer.testing.slopes import differences
from composeformer.testing.subject import Subject

# What losses and weights of experts are told in.
WIDE = (torch.float32, torch.float64)


@law(
    "ffn",
    "sides",
    "losses are in fp32 or wider, counts are int64 and constants, all by paths below the part's own",
    kills="counts-in-half-precision",
)
def sides(case: Case) -> None:
    x, ids = case.stream("x", 2, case.integer("tokens", 1, LONGEST)), case.ids("ids", 2, 1)
    hidden, aux = transform(case, case.model, x, ids.expand(x.shape[:2]))
    case.require(hidden.dtype == case.dtype, f"the output is {hidden.dtype}, activations are {case.dtype}")
    for name in (*aux.losses, *aux.counts, *aux.metrics):
        case.require(name.startswith(f"{case.node.path}."), f"{name} is not below {case.node.path}")
    for name, loss in aux.losses.items():
        case.require(loss.dtype in WIDE, f"the loss {name} is {loss.dtype}, must be fp32 or wider")
        case.finite(loss, f"the loss {name}")
    for name, count in aux.counts.items():
        case.require(count.dtype == torch.int64, f"the count {name} is {count.dtype}, must be int64")
        case.require(not bool((count < 0).any()), f"the count {name} is negative")
    for name, pair in aux.metrics.items():
        case.require(not any(each.requires_grad for each in pair), f"the metric {name} has a gradient")


@law(
    "ffn",
    "phases",
    "the output is the same in every phase; losses and counts are training's alone",
    kills="counts-in-evaluation",
)
def phases(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = settled(case, rows, tokens)
    with torch.no_grad():
        found = {phase: transform(case, case.model, x, ids, phase=phase) for phase in PHASES}
    for phase in PHASES[1:]:
        case.close(found[phase].hidden, found["train"].hidden, f"the output in {phase}")
        told = [*found[phase].aux.losses, *found[phase].aux.counts]
        case.require(not told, f"in {phase} it gives {', '.join(told)}")


def only_reference(subject: Subject) -> str | None:
    """Others have the reference's gradients, by a law of every slot."""
    return None if subject.implementation.name == "reference" else "it is the reference's"


@law(
    "ffn",
    "derivative",
    "gradients are the derivatives of the output and the losses",
    kills="weights-without-a-gradient",
    claimed=True,
    applies=only_reference,
)
def derivative(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = case.stream("x", rows, tokens).double(), case.ids("ids", rows, tokens)
    weights = case.normal("weights", 64, dtype=torch.float64)

    def weighed(y: Tensor) -> Tensor:
        found = value(case, case.judge, y, ids)
        return found * weights.repeat(-(-len(found) // 64))[: len(found)]

    differences(case, weighed, x, "the derivative of outputs and losses")
