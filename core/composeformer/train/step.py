"""One optimizer step in one process: losses of micro-batches, backward, clip, optimizer, work after it.

The weight of the whole step is counted before the first backward, and every micro-batch divides its summed
loss by it: so n micro-batches give the gradients of one batch, however labels are spread over them. Side
losses are sums too, and are divided by the same weight.
"""

from collections.abc import Mapping, Sequence
from math import inf, isfinite

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer

from composeformer.decoder import Model
from composeformer.errors import InputError
from composeformer.tensors import ModelOutput
from composeformer.train.after import Run, add_counts, after_step
from composeformer.train.batch import TokenBatch
from composeformer.train.gradients import clip, global_norm
from composeformer.train.roles import Objective


@attrs.frozen(kw_only=True)
class StepResult:
    """What a step did: `loss` is the objective's mean, `losses` side losses and `metrics` means, by path.

    `grad_norm` is taken before clipping. `tokens` are those that are real, `weight` the labels' weight;
    `counts` are totals by path. Of a predictor `losses` has each depth's weighted loss, `metrics` its mean over
    the labels of that depth; `metrics` also has what parts tell after the step.
    `skipped` says why neither the optimizer nor any part's work ran, or is None.
    """

    step: int
    loss: float
    grad_norm: float
    tokens: int
    weight: float
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    counts: Mapping[str, Tensor] = attrs.field(repr=False)
    skipped: str | None = None


def train_step(
    model: Model,
    batches: Sequence[TokenBatch],
    objective: Objective,
    optimizer: Optimizer,
    *,
    step: int,
    clip_norm: float | None = None,
    values: Mapping[str, float] | None = None,
) -> StepResult:
    """Learns once from all of `batches`, the micro-batches of one step; `step` counts from 0.

    Without `clip_norm` gradients are not clipped. `values` are scheduled fields of parts by dotted path, which
    their `after_step` reads. Gradients are left on the parameters until the next step. A step is skipped, and
    says so, where the loss or the gradients' norm is not finite, or nothing had a label. Raises InputError
    without batches, or for a `clip_norm` that is no finite number above 0.
    """
    if not batches:
        raise InputError("a training step needs at least one batch")
    if clip_norm is not None and not 0 < clip_norm < inf:
        raise InputError(f"clip_norm = {clip_norm}: must be a finite number > 0")
    batches = [batch.to(model.device) for batch in batches]
    weight = torch.stack([objective.weight(batch.seen()) for batch in batches]).sum()
    divisor = torch.where(weight > 0, weight, 1)
    tokens = torch.stack([batch.num_tokens() for batch in batches]).sum()
    ledger = _Ledger()
    values = values or {}
    weight_of_predictions = _predictor_weight(model, values)
    model.zero_grad(set_to_none=True)
    for batch in batches:
        loss = ledger.add(_forward(model, batch), batch, objective, weight_of_predictions)
        torch.autograd.backward(loss / divisor)
    norm = global_norm(model.parameters())
    if clip_norm is not None:
        clip(model.parameters(), norm, clip_norm)
    result = ledger.result(step, norm, tokens, weight)
    if result.skipped is None:
        optimizer.step()
        run = Run(step=step, tokens=result.tokens, path="", config=None, values=values)
        metrics = after_step(model, result.counts, run)
        result = attrs.evolve(result, metrics={**result.metrics, **metrics})
    return result


def _predictor_weight(model: Model, values: Mapping[str, float]) -> float:
    """What the predictions' losses are multiplied by, as scheduled if it is."""
    node = model.spec.plan.predictor
    if node is None:
        return 0.0
    return float(values.get("predictor.loss_weight", node.part.config.loss_weight))


def _forward(model: Model, batch: TokenBatch) -> ModelOutput:
    ids, valid, documents, positions = batch
    given = {"positions": positions, "documents": documents, "valid": valid}
    output: ModelOutput = model(ids, **given, phase="train", predict=model.predictor is not None)
    return output


class _Ledger:
    """Sums over a step's micro-batches, kept on the device until the step is done."""

    def __init__(self) -> None:
        self._loss: list[Tensor] = []
        self._losses: dict[str, list[Tensor]] = {}
        self._metrics: dict[str, list[Tensor]] = {}
        self._counts: dict[str, Tensor] = {}

    def add(
        self, outputs: ModelOutput, batch: TokenBatch, objective: Objective, predictor_weight: float
    ) -> Tensor:
        """Enters one forward; returns its summed loss, side losses included."""
        loss, _ = objective(outputs, batch.seen())
        self._loss.append(loss.detach())
        sides = dict(outputs.aux.losses)
        for depth, prediction in enumerate(outputs.predictions, 1):
            told = ModelOutput(prediction.logits, prediction.hidden)
            side, weight = objective(told, prediction.batch)
            path = f"predictor.depth_{depth}"
            self._metrics.setdefault(path, []).append(_pair(side, weight))
            sides[path] = side * (predictor_weight * prediction.share)
        for path, side in sides.items():
            self._losses.setdefault(path, []).append(side.detach().sum())
            loss = loss + side.sum()
        for path, pair in outputs.aux.metrics.items():
            self._metrics.setdefault(path, []).append(_pair(*pair))
        add_counts(self._counts, outputs.aux)
        return loss

    def result(self, step: int, norm: Tensor, tokens: Tensor, weight: Tensor) -> StepResult:
        """The step's sums as numbers, read from the device at once."""
        sums = [norm, tokens, weight, _sum(self._loss), *(_sum(side) for side in self._losses.values())]
        total_norm, total_tokens, total_weight, loss, *sides = torch.stack(
            [s.double().cpu() for s in sums]
        ).tolist()
        mean = 1 / total_weight if total_weight else 0.0
        pairs = {path: torch.stack(pair).sum(0).tolist() for path, pair in self._metrics.items()}
        skipped = None
        if not isfinite(loss + sum(sides)):
            skipped = f"the loss is not finite ({loss + sum(sides)})"
        elif not isfinite(total_norm):
            skipped = f"the norm of the gradients is not finite ({total_norm})"
        elif not total_weight:
            skipped = "no token has a label"
        return StepResult(
            step=step,
            loss=loss * mean,
            grad_norm=total_norm,
            tokens=int(total_tokens),
            weight=total_weight,
            losses={path: side * mean for path, side in zip(self._losses, sides)},
            metrics={path: value / count if count else 0.0 for path, (value, count) in pairs.items()},
            counts=self._counts,
            skipped=skipped,
        )


def _pair(value: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([value.detach().double(), weight.detach().double()])


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()
