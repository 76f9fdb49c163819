"""Laws of training steps: what a step says of itself, when gradients are clipped, and values that are scheduled.

What a step tells is defined by sums: of the losses of all its tokens, each divided by the labels that it is of.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from composeformer.config import facts_of
from composeformer.decoder import Model
from composeformer.errors import join
from composeformer.plan import Node
from composeformer.tensors import ModelOutput
from composeformer.testing.laws.model_rows import row_of
from composeformer.testing.laws.model_steps import descent, labelled, told
from composeformer.testing.models import ModelCase, gradients_of, model_law
from composeformer.testing.twins import twin
from composeformer.train import TokenBatch, train_step

# Of the norm of the gradients: what they are clipped to.
ENLARGED = 1e-6  # what `torch.nn.utils.clip_grad_norm_` adds to a norm
TIMES = (0.25, 4.0, 2.0**20)
VALUES = (0.125, 0.5, 1.0)


@model_law(
    "told",
    "losses that a step tells are sums over all its tokens for each label of the step, metrics means over what they are"
    " of, tokens and counts totals",
    kills="metrics-are-sums",
    examples=12,
)
def told_by_hand(case: ModelCase) -> None:
    batch = labelled(case)
    cuts = sorted({0, len(batch.ids), *case.integers("cuts", 0, len(batch.ids), 0, 2)})
    pieces = [row_of(batch, range(a, b)) for a, b in pairwise(cuts)]

    def by_hand(model: Model) -> dict[str, Tensor]:
        with torch.no_grad():
            return summed_up(case, model, pieces)

    wanted = case.measured(f"told of {cuts}", by_hand)
    model = case.fresh()
    found = told(train_step(model, pieces, case.objective, descent(model), step=0))
    # What parts tell after a step is theirs.
    own = tuple(f"metric {path}." for path, module in model.named_modules() if hasattr(module, "after_step"))
    for name in found.keys() - wanted.values.keys() - {"norm"}:
        case.require(name.startswith(own), f"a step tells {name}, which no forward gives")
    case.agree(
        {name: found[name] for name in wanted.values if name in found}, wanted, f"micro-batches {cuts}"
    )


def summed_up(case: ModelCase, model: Model, pieces: list[TokenBatch]) -> dict[str, Tensor]:
    """What a step tells of its micro-batches, by its definition."""
    node = case.spec.plan.predictor
    share = 0.0 if node is None else float(node.part.config.loss_weight)
    zero = torch.zeros((), dtype=torch.float64)
    loss, weight, tokens = zero, zero, torch.tensor(0)
    sides: dict[str, Tensor] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    counts: dict[str, Tensor] = {}
    for piece in pieces:
        ids, valid, documents, _ = piece
        output = model(ids, valid=valid, documents=documents, phase="train", predict=node is not None)
        own, labels = case.objective(output, piece.seen())
        loss, weight = loss + own, weight + labels
        tokens = tokens + (ids.numel() if valid is None else valid.sum())
        for path, side in output.aux.losses.items():
            sides[path] = sides.get(path, zero) + side.sum()
        told_of = dict(output.aux.metrics)
        for depth, each in enumerate(output.predictions, 1):
            path = f"predictor.depth_{depth}"
            told_of[path] = case.objective(ModelOutput(each.logits, each.hidden), each.batch)
            sides[path] = sides.get(path, zero) + told_of[path][0] * share * each.share
        for path, (value, number) in told_of.items():
            before = pairs.get(path, (zero, zero))
            pairs[path] = before[0] + value, before[1] + number
        for path, count in output.aux.counts.items():
            counts[path] = counts.get(path, torch.zeros_like(count)) + count
    return {
        "loss": loss / weight,
        "weight": weight,
        "tokens": tokens,
        **{f"side {path}": side / weight for path, side in sides.items()},
        **{f"metric {path}": value / number if number else zero for path, (value, number) in pairs.items()},
        **counts,
    }


@model_law(
    "clipped",
    "a limit that the norm of the gradients keeps within changes no bit of them; a lower one shortens them to itself",
    kills="clipping-lengthens",
    examples=8,
)
def clipped(case: ModelCase) -> None:
    batch = labelled(case)

    def gradients(number: int, clip: float | None) -> tuple[dict[str, Tensor], float]:
        model = case.fresh(number)
        result = train_step(model, [batch], case.objective, descent(model), step=0, clip_norm=clip)
        return gradients_of(model), result.grad_norm

    plain, norm = gradients(0, None)
    if not norm:
        case.draw.reject("there is no gradient")
    times = case.choice("times the norm", TIMES)
    found, before = gradients(1, times * norm)
    case.equal(before, norm, "the norm that is told of gradients that are clipped")
    if times > 1:
        case.same(found, plain, f"gradients of norm {norm:.3g} with a limit of {times * norm:.3g}")
        return
    # One product more, of a quotient of numbers that are rounded themselves; the norm may be enlarged as PyTorch does.
    error = case.error_in(torch.float32) + ENLARGED / norm
    for name, each in plain.items():
        moved = float((found[name].double() - times * each.double()).abs().max())
        bound = error * times * float(each.abs().max())
        case.within(moved, bound, f"{name} clipped to {times} of the norm")


@model_law(
    "scheduled",
    "a value that is scheduled for a step is that of its field in that step",
    kills="schedule-comes-a-step-late",
    examples=6,
)
def scheduled(case: ModelCase) -> None:
    """Each step is one of a model whose spec states the value, bit by bit. Fields that a forward reads too are for no
    schedule but the weight of predictions.
    """
    batch = labelled(case)
    fields = list(schedulable(case))
    if not fields:
        case.draw.reject("no part has a field that can be scheduled")
    for node, name in fields:
        label = join(node.path, name)
        model = case.fresh()
        for number, value in enumerate((0.0, case.choice(f"value of {label}", VALUES))):
            stated = twin(case, node, **{name: value})
            if stated is None:
                continue
            stated.load_state_dict(model.state_dict())
            if node.slot != "predictor" and read_in_a_forward(case, stated, model):
                break
            values = {
                join(each.path, name): value
                for each in stated.spec.plan.nodes()
                if each.part.component is node.part.component and getattr(each.part.config, name) == value
            }
            found, wanted = (
                stepped(case, one, batch, number, given) for one, given in ((model, values), (stated, {}))
            )
            case.same(found, wanted, f"step {number}, {label} = {value}")


def schedulable(case: ModelCase) -> Iterator[tuple[Node, str]]:
    """The weight of predictions, and what numbers the work after a step may read, in one part of each kind."""
    seen = set()
    for node in case.spec.plan.nodes():
        if node.path == "predictor":
            yield node, "loss_weight"
        elif node.part.component in seen:
            continue
        elif hasattr(case.model.get_submodule(node.path), "after_step"):
            seen.add(node.part.component)
            for name, fact in facts_of(type(node.part.config)).items():
                if fact.kind == "float" and not fact.many:
                    yield node, name


def read_in_a_forward(case: ModelCase, stated: Model, model: Model) -> bool:
    """Whether two models of the same values differ before their step ends."""
    one, other = case.results(stated, case.batch), case.results(model, case.batch)
    return one.keys() != other.keys() or any(not torch.equal(one[name], other[name]) for name in one)


def stepped(
    case: ModelCase, model: Model, batch: TokenBatch, number: int, values: dict[str, float]
) -> dict[str, Tensor]:
    """All that a step with scheduled values tells and leaves."""
    result = train_step(model, [batch], case.objective, descent(model), step=number, values=values)
    weights = {f"after {name}": each.clone() for name, each in model.state_dict().items()}
    return {**told(result), **gradients_of(model), **weights}
