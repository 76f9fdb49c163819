"""One optimizer step: losses of micro-batches, backward, clip, optimizer, work after it.

The weight of the whole step, in all processes, is counted before the first backward, and every micro-batch divides
its summed loss by it: so n micro-batches in each of W processes give the gradients of one batch, however labels are
spread over them. Side losses are sums too, and are divided by the same weight.
"""

from collections.abc import Mapping, Sequence
from math import inf

import attrs
import torch
from torch.optim import Optimizer

from composeformer.decoder import Model
from composeformer.errors import InputError
from composeformer.tensors import ModelOutput
from composeformer.train.after import Run, after_step
from composeformer.train.batch import TokenBatch
from composeformer.train.gradients import Gradients
from composeformer.train.ledger import Ledger, StepResult
from composeformer.train.meeting import met, summed
from composeformer.train.roles import Objective


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
    says so, where the loss or the gradients' norm is not finite, or nothing had a label. Over several processes
    each calls this with as many batches of its own, and all learn from all. Raises InputError without batches, or
    with other numbers of them in other processes, or for a `clip_norm` that is no finite number above 0.
    """
    if clip_norm is not None and not 0 < clip_norm < inf:
        raise InputError(f"clip_norm = {clip_norm}: must be a finite number > 0")
    batches = [batch.to(model.device) for batch in met(model, batches)]
    if not batches:
        raise InputError("a training step needs at least one batch")
    weight = torch.stack([objective.weight(batch.seen()) for batch in batches]).sum()
    tokens = torch.stack([batch.num_tokens() for batch in batches]).sum()
    weight, tokens = summed(model, weight, tokens)
    divisor = torch.where(weight > 0, weight, 1)
    ledger = Ledger(model.placement.world)
    values = values or {}
    weight_of_predictions = _predictor_weight(model, values)
    model.zero_grad(set_to_none=True)
    for number, batch in enumerate(batches, 1):
        model.placement.syncs(model, last=number == len(batches))
        loss = ledger.add(_forward(model, batch), batch, objective, weight_of_predictions)
        torch.autograd.backward(loss / divisor)
    gradients = Gradients(model)
    gradients.reduce()
    norm = gradients.norm()
    if clip_norm is not None:
        gradients.clip(norm, clip_norm)
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
