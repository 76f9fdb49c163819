"""Laws of training steps: what one step does, computed by hand; micro-batches; what stands between steps; resuming.

Weights after a step are those of plain gradient descent, so that they differ by no more than gradients do.
"""

import copy
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer

import composeformer as cf
from composeformer.assemble import build, in_dtype
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.testing.laws.model_rows import row_of
from composeformer.testing.models import GRADIENT, ModelCase, gradients_of, model_law
from composeformer.train import StepResult, TokenBatch, train_step, trained, trainer

RATE = 0.5
CLIPS = (None, 0.01, 100.0)


def descent(model: Model) -> Optimizer:
    return SGD([one.parameter for one in trained(model)], lr=RATE)


def told(result: StepResult) -> dict[str, Tensor]:
    """What a step says of itself, as results."""
    numbers = {
        "loss": result.loss,
        "norm": result.grad_norm,
        **{f"side {n}": v for n, v in result.losses.items()},
    }
    numbers |= {f"metric {name}": each for name, each in result.metrics.items()}
    found = {name: torch.tensor(each, dtype=torch.float64) for name, each in numbers.items()}
    return {
        **found,
        "tokens": torch.tensor(result.tokens),
        "weight": torch.tensor(result.weight),
        **result.counts,
    }


def step(
    case: ModelCase, model: Model, batches: Sequence[TokenBatch], clip: float | None = None
) -> dict[str, Tensor]:
    """All that a step of plain descent tells and leaves: results, gradients, weights, buffers."""
    result = train_step(model, batches, case.objective, descent(model), step=0, clip_norm=clip)
    weights = {f"after {name}": each.detach().clone() for name, each in model.state_dict().items()}
    return {**told(result), **gradients_of(model), **weights}


def labelled(case: ModelCase) -> TokenBatch:
    """The case's batch; one without a label is rejected."""
    if not case.objective.weight(case.batch.seen()):
        case.draw.reject("no token has a label")
    return case.batch


@model_law(
    "step",
    "a step descends along the gradient of all losses over the weight of its labels, clipped by its norm",
    kills="predictions-are-not-learnt",
    examples=8,
)
def stepped(case: ModelCase) -> None:
    batch, clip = labelled(case), case.choice("clip_norm", CLIPS)
    node = case.spec.plan.predictor
    share = 0.0 if node is None else float(node.part.config.loss_weight)

    def by_hand(model: Model) -> dict[str, Tensor]:
        """As the definition has it."""
        ids, valid, documents, _ = batch
        model.zero_grad(set_to_none=True)
        output = model(ids, valid=valid, documents=documents, predict=node is not None)
        loss, weight = case.objective(output, batch.seen())
        total = loss + sum(each.sum() for each in output.aux.losses.values())
        for each in output.predictions:
            side, _ = case.objective(output._replace(logits=each.logits, hidden=each.hidden), each.batch)
            total = total + share * each.share * side
        torch.autograd.backward(total / weight)
        norm = clip_grad_norm_(model.parameters(), float("inf") if clip is None else clip)
        found = gradients_of(model)
        names = {id(p): name for name, p in model.named_parameters()}
        weights = {
            f"after {names[id(one.parameter)]}": one.parameter.detach()
            - RATE * found.get(GRADIENT + names[id(one.parameter)], torch.zeros(()))
            for one in trained(model)
        }
        return {"loss": (loss / weight).detach(), "norm": norm, **found, **weights}

    wanted = case.measured(f"by hand, {clip}", by_hand)
    found = step(case, case.fresh(), [batch], clip)
    case.agree({name: found[name] for name in wanted.values}, wanted, "the step")
    if clip is not None:
        length = float(
            torch.stack([p.square().sum() for n, p in found.items() if n.startswith(GRADIENT)]).sum().sqrt()
        )
        case.require(length <= clip * (1 + 1 / 2**20), f"gradients clipped to {clip} have norm {length}")


@model_law(
    "accumulated",
    "micro-batches, in any order, make the step of one batch: loss, gradients, counts, weights, buffers",
    kills="loss-is-divided-by-each-micro-batch",
    examples=10,
)
def accumulated(case: ModelCase) -> None:
    batch, clip = labelled(case), case.choice("clip_norm", CLIPS)
    wanted = case.measured(
        f"one batch, {clip}", lambda model: step(case, case.fresh(1, model), [batch], clip)
    )
    order = case.draw("order", _permutations(len(batch.ids)))
    cuts = sorted({0, len(order), *case.integers("cuts", 0, len(order), 0, 2)})
    pieces = [order[a:b] for a, b in pairwise(cuts)]
    found = step(case, case.fresh(), [row_of(batch, piece) for piece in pieces], clip)
    case.agree(found, wanted, f"micro-batches {pieces}")


def _permutations(number: int) -> "st.SearchStrategy[list[int]]":
    return st.permutations(range(number)).map(list)


@model_law(
    "evaluated",
    "passes between steps, of any sort, leave training as it is, bit by bit",
    kills="evaluation-moves-the-bias",
    examples=15,
)
def evaluated(case: ModelCase) -> None:
    batch, other = labelled(case), case.rows("other")
    plain, watched = case.fresh(0), case.fresh(1)
    for number in range(2):
        for sort in case.integers(f"passes before step {number}", 0, 3, 1, 2):
            passed(watched, other, sort)
        case.same(step(case, watched, [batch]), step(case, plain, [batch]), f"step {number}")


def passed(model: Model, batch: TokenBatch, sort: int) -> None:
    """One pass that is no training step: with gradients or without, in either mode, or through a cache."""
    ids, valid, documents, _ = batch
    if sort == 3:
        with torch.no_grad():
            model(ids, cache=model.new_cache(*ids.shape), valid=valid, documents=documents)
        return
    model.train(sort == 2)
    with torch.set_grad_enabled(sort > 0):
        model(ids, valid=valid, documents=documents, phase=None if sort else "prefill")
    model.train()


@model_law(
    "unlabelled",
    "without a label a step is skipped, changes nothing and says so; all numbers stay finite",
    kills="nothing-to-learn-is-divided-by",
    examples=5,
)
def unlabelled(case: ModelCase) -> None:
    count = case.integer("rows", 1, 3)
    if case.boolean("padding alone"):
        ids = case.ids("ids", count, case.integer("tokens", 1, 6))
        batch = TokenBatch(ids, torch.zeros_like(ids, dtype=torch.bool))
    else:
        batch = TokenBatch(case.ids("ids", count, 1))
    if case.objective.weight(batch.seen()):
        case.draw.reject("the objective finds labels there")
    model = case.fresh()
    before = copy.deepcopy(model.state_dict())
    result = train_step(model, [batch], case.objective, descent(model), step=0)
    case.require(result.skipped, "a step without labels is not skipped")
    case.same(model.state_dict(), before, "after a step that was skipped")
    for name, each in {**told(result), **gradients_of(model)}.items():
        case.finite(each, name)


@model_law(
    "resumed",
    "a run that is saved, read back and goes on is one that was never stopped, bit by bit",
    kills="a-read-model-lists-its-parameters-otherwise",
    examples=6,
)
def resumed(case: ModelCase) -> None:
    batch = labelled(case)
    model = case.fresh()
    objective, optimizer = trainer(model)
    train_step(model, [batch], objective, optimizer, step=0, clip_norm=1.0)
    with tempfile.TemporaryDirectory() as folder:
        cf.save(model, Path(folder) / "model", max_shard_bytes=case.choice("max_shard_bytes", [2**12, 2**30]))
        other = cf.load(Path(folder) / "model")
    again, more = trainer(other)
    more.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in (1, 2):
        results = [
            told(train_step(one, [batch], loss, rule, step=number))
            for one, loss, rule in ((model, objective, optimizer), (other, again, more))
        ]
        case.same(results[1], results[0], f"step {number}")
    case.same(other.state_dict(), model.state_dict(), "after the steps")


@model_law(
    "tied",
    "a shared tensor is one parameter, whose gradient is the sum of those of all its uses",
    kills="tied-head-is-detached",
    examples=6,
)
def tied(case: ModelCase) -> None:
    try:
        one, two = (case.spec.with_({"model.tie_embeddings": tie}) for tie in (True, False))
    except SpecError as error:  # a head may refuse to be tied
        case.draw.reject(str(error.problems[0]))
    one, two = in_dtype(one, "float64"), in_dtype(two, "float64")
    aliases = {name: target for name, target in one.plan.aliases.items() if name in two.plan.tensors}
    if not aliases:
        case.draw.reject("nothing is shared")
    model, apart = case.built(one), build(two, seed=0)
    state = model.state_dict()
    apart.load_state_dict({name: state[aliases.get(name, name)] for name in apart.state_dict()})
    own = {name for name, _ in model.named_parameters()}
    case.require(not own & set(aliases), "a shared tensor is listed as a parameter twice")
    batch = case.batch

    def joined(model: Model) -> dict[str, Tensor]:
        found = case.results(model, batch)
        for name, target in aliases.items():
            part = found.pop(GRADIENT + name, None)
            if part is not None:
                found[GRADIENT + target] = found.get(GRADIENT + target, torch.zeros_like(part)) + part
        return found

    wanted = case.measure(joined, apart, case.error_in(torch.float64))
    case.agree(case.results(model, batch), wanted, "with shared tensors")
