"""Laws of training steps: batches with positions, or in longer rows; steps that are skipped; work of parts after steps.

Shapes: B rows, T tokens.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from composeformer.decoder import Model
from composeformer.tensors import ModelOutput
from composeformer.testing.laws.model_rows import whole
from composeformer.testing.laws.model_steps import descent, labelled
from composeformer.testing.models import GRADIENT, ModelCase, gradients_of, model_law
from composeformer.train import Run, train_step

FARTHEST = 9  # every model drawn serves as many positions
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


@model_law(
    "given-positions",
    "a step learns at the positions that its batch gives",
    kills="training-counts-positions-anew",
    examples=5,
)
def given_positions(case: ModelCase) -> None:
    batch = labelled(case)
    count, length = batch.ids.shape
    places = torch.tensor([case.integers(f"places {n}", 0, FARTHEST, length, length) for n in range(count)])
    batch = batch._replace(positions=places)

    node = case.spec.plan.predictor
    share = 0.0 if node is None else float(node.part.config.loss_weight)

    def by_hand(model: Model) -> dict[str, Tensor]:
        ids, valid, documents, positions = batch
        told = {"valid": valid, "documents": documents, "positions": positions}
        model.zero_grad(set_to_none=True)
        output = model(ids, **told, phase="train", predict=node is not None)
        loss, weight = case.objective(output, batch.seen())
        total = loss + sum(each.sum() for each in output.aux.losses.values())
        for each in output.predictions:
            side, _ = case.objective(ModelOutput(each.logits, each.hidden), each.batch)
            total = total + share * each.share * side
        torch.autograd.backward(total / weight)
        return {"loss": (loss / weight).detach(), **gradients_of(model)}

    wanted = case.measured("positions given", by_hand)
    model = case.fresh()
    result = train_step(model, [batch], case.objective, descent(model), step=0)
    found = {"loss": torch.tensor(result.loss, dtype=torch.float64), **gradients_of(model)}
    case.agree(found, wanted, "at positions that are given")


@model_law(
    "lengthened",
    "a batch in longer rows is the same batch",
    kills="rows-are-lengthened-by-tokens",
    examples=6,
)
def lengthened(case: ModelCase) -> None:
    batch = case.batch
    if case.boolean("positions given"):
        batch = batch._replace(positions=torch.arange(batch.ids.shape[1]).expand_as(batch.ids))
    longer = batch.padded(batch.ids.shape[1] + case.integer("more", 1, 4))
    case.equal(int(longer.num_tokens()), int(batch.num_tokens()), "real tokens in longer rows")
    wanted = case.measure(lambda model: whole(case, model, batch), case.model, case.error_in(torch.float64))
    case.agree(whole(case, case.model, longer), wanted, "in longer rows")


@model_law(
    "not-finite",
    "a step whose loss or gradients are not finite is skipped, says so, and changes nothing",
    kills="what-is-not-finite-is-stepped",
    examples=8,
)
def not_finite(case: ModelCase) -> None:
    batch, odd = labelled(case), case.choice("value", NOT_FINITE)
    model = case.fresh()
    parameters = dict(model.named_parameters())
    name = case.choice("parameter", sorted(parameters))
    parameter: Any = parameters[name]
    hooks = []
    if case.boolean("gradient alone"):
        hooks.append(parameter.register_hook(lambda gradient: torch.full_like(gradient, odd)))
    else:
        with torch.no_grad():
            parameter.view(-1)[case.integer("place", 0, parameter.numel() - 1)] = odd
    try:
        spoilt = {n: each for n, each in case.results(model, batch).items() if each.is_floating_point()}
        before = copy.deepcopy(model.state_dict())
        result = train_step(model, [batch], case.objective, descent(model), step=0)
    finally:
        for hook in hooks:
            hook.remove()
    names = ("loss", *(n for n in spoilt if n.startswith(GRADIENT)))
    if all(bool(spoilt[n].isfinite().all()) for n in names):
        case.draw.reject(f"{odd} in {name} reaches nothing")
    case.require(result.skipped, f"a step with {odd} in {name}, or in its gradient, is not skipped")
    case.same(model.state_dict(), before, "after a step that was skipped")


@model_law(
    "after-step",
    "each part that works after a step is called once, and told the step, its real tokens, its own path, config and"
    " counts",
    kills="parts-are-not-told-the-step",
    examples=12,
)
def after_step(case: ModelCase) -> None:
    batch, number = labelled(case), case.integer("step", 0, 9)
    model = case.fresh()
    parts = {path: part for path, part in model.named_modules() if path and hasattr(part, "after_step")}
    if not parts:
        case.draw.reject("no part works after a step")
    heard: list[tuple[str, dict[str, Tensor], Run]] = []
    for path, part in parts.items():
        _heard(part, path, heard)
    try:
        batches = [batch] * case.integer("micro-batches", 1, 2)
        result = train_step(model, batches, case.objective, descent(model), step=number)
    finally:
        for part in parts.values():
            del part.__dict__["after_step"]
    case.equal(
        [path for path, _, _ in heard], list(parts), "parts that work after a step, as they are called"
    )
    configs = {node.path: node.part.config for node in case.spec.plan.nodes()}
    for path, totals, run in heard:
        case.equal(
            (run.step, run.tokens, run.path), (number, result.tokens, path), "what a part is told of a step"
        )
        case.equal(run.config, configs.get(path), f"the config that {path} is told")
        own = {
            name.removeprefix(f"{path}."): each
            for name, each in result.counts.items()
            if name.startswith(f"{path}.")
        }
        case.same(totals, own, f"the counts that {path} is told")


def _heard(part: nn.Module, path: str, heard: list[tuple[str, dict[str, Tensor], Run]]) -> None:
    """Puts a listener before the work of a part."""
    work: Any = part.after_step

    def listening(totals: dict[str, Tensor], run: Run) -> Any:
        heard.append((path, dict(totals), run))
        return work(totals, run)

    part.__dict__["after_step"] = listening
