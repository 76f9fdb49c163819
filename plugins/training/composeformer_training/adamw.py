"""AdamW (`adamw`): Adam with weight decay outside the moments, on matrices and never on norms or biases.

Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, as `torch.optim.AdamW` computes it. The
reference leaves torch to loop or to stack tensors, which gives the same bits; `fused` kernels do not. Where the
precision policy keeps moments in another dtype than weights, `moments` computes the same.
"""

from collections.abc import Sequence
from typing import Any

from torch.optim import AdamW as TorchAdamW
from torch.optim import Optimizer

from composeformer.train import Trained
from composeformer_training.config import AdamW
from composeformer_training.moments import MomentAdamW


def make(config: AdamW, trained: Sequence[Trained], learning_rate: float) -> Optimizer:
    """An optimizer of two groups: what decays, and what does not; two for each dtype of moments, and two for shards
    beside what a process holds whole.
    """
    if all(kept(one) == _stored(one) for one in trained):
        return _make(config, trained, learning_rate, fused=None)
    groups: list[dict[str, Any]] = [
        {
            "params": [
                (o.name, o.parameter) for o in trained if o.is_matrix is matrices and kept(o) == moment
            ],
            "weight_decay": config.weight_decay if matrices else 0.0,
            "moment": moment,
        }
        for moment in sorted({kept(one) for one in trained})
        for matrices in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    return MomentAdamW(groups, learning_rate, (config.beta1, config.beta2), config.eps)


def make_fused(config: AdamW, trained: Sequence[Trained], learning_rate: float) -> TorchAdamW:
    """The same in one kernel a group, where moments have the weights' dtype."""
    return _make(config, trained, learning_rate, fused=True)


def kept(one: Trained) -> str:
    """The name of the dtype in which a parameter's moments are kept."""
    return _stored(one) if one.format is None else one.format.moment


def _stored(one: Trained) -> str:
    return str(one.parameter.dtype).removeprefix("torch.")


def _make(config: AdamW, trained: Sequence[Trained], learning_rate: float, fused: bool | None) -> TorchAdamW:
    # PyTorch stacks or fuses shards, or whole tensors, but not both together.
    groups: list[dict[str, Any]] = [
        {
            "params": [
                (o.name, o.parameter) for o in trained if (o.is_matrix, o.is_shard) == (matrices, shards)
            ],
            "weight_decay": config.weight_decay if matrices else 0.0,
        }
        for matrices in (True, False)
        for shards in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    return TorchAdamW(groups, lr=learning_rate, betas=betas, eps=config.eps, fused=fused)
