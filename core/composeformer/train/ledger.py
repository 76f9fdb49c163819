"""Sums over a step's micro-batches and processes, and what they make of the step."""

from collections.abc import Mapping, Sequence
from math import isfinite

import attrs
import torch
from torch import Tensor

from composeformer.parallel import World
from composeformer.tensors import ModelOutput
from composeformer.train.after import add_counts
from composeformer.train.batch import TokenBatch
from composeformer.train.roles import Objective


@attrs.frozen(kw_only=True)
class StepResult:
    """What a step did: `loss` is the objective's mean, `losses` side losses and `metrics` means, by path.

    `grad_norm` is taken before clipping. `tokens` are those that are real, `weight` the labels' weight;
    `counts` are totals by path. Of a predictor `losses` has each depth's weighted loss, `metrics` its mean over
    the labels of that depth; `metrics` also has what parts tell after the step.
    `skipped` says why neither the optimizer nor any part's work ran, or is None. Over several processes all of it
    is of the whole step, and the same in each.
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


class Ledger:
    """Sums over a step's micro-batches, kept on the device until the step is done."""

    def __init__(self, world: World) -> None:
        self._world = world
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
        """The step's sums as numbers, read from the device at once. Norm, tokens and weight are the whole step's.

        Raises InputError in every process where parts told other things in one than in another.
        """
        own = torch.stack(
            [
                s.double()
                for s in (
                    _sum(self._loss),
                    *(_sum(side) for side in self._losses.values()),
                    *(part for pair in self._metrics.values() for part in torch.stack(pair).sum(0)),
                )
            ]
        )
        counts = self._summed_counts()
        whole = [norm.double(), tokens.double(), weight.double()]
        numbers = torch.cat([torch.stack([w.to(own.device) for w in whole]), self._world.sum(own)]).tolist()
        total_norm, total_tokens, total_weight, loss, *rest = numbers
        sides, pairs = rest[: len(self._losses)], rest[len(self._losses) :]
        mean = 1 / total_weight if total_weight else 0.0
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
            losses={path: side * mean for path, side in zip(self._losses, sides, strict=True)},
            metrics={
                path: value / count if count else 0.0
                for path, value, count in zip(self._metrics, pairs[::2], pairs[1::2], strict=True)
            },
            counts=counts,
            skipped=skipped,
        )

    def _summed_counts(self) -> dict[str, Tensor]:
        """The counts of all processes, in integers: no order of adding changes them."""
        if self._world.size == 1:
            return self._counts
        shapes = {path: list(count.shape) for path, count in self._counts.items()}
        told = {"counts": str(shapes), "losses": str([*self._losses]), "metrics": str([*self._metrics])}
        self._world.agree({f"the {name} that parts tell": text for name, text in told.items()}, "end a step")
        if not self._counts:
            return {}
        flat = self._world.sum(torch.cat([count.reshape(-1) for count in self._counts.values()]))
        parts = torch.split(flat, [count.numel() for count in self._counts.values()])
        return {
            path: part.view(count.shape)
            for (path, count), part in zip(self._counts.items(), parts, strict=True)
        }


def _pair(value: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([value.detach().double(), weight.detach().double()])


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()
