"""AdamW (`adamw`): Adam with weight decay outside the moments, on matrices and never on norms or biases.

Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, as `torch.optim.AdamW` computes it. The
reference leaves torch to loop or to stack tensors, which gives the same bits; `fused` kernels do not.
"""

from collections.abc import Sequence
from typing import Any

from torch.optim import AdamW as TorchAdamW

from composeformer.train import Trained
from composeformer_training.config import AdamW


def make(config: AdamW, trained: Sequence[Trained], learning_rate: float) -> TorchAdamW:
    """An optimizer of two groups: what decays, and what does not."""
    return _make(config, trained, learning_rate, fused=None)


def make_fused(config: AdamW, trained: Sequence[Trained], learning_rate: float) -> TorchAdamW:
    """The same in one kernel a group."""
    return _make(config, trained, learning_rate, fused=True)


def _make(config: AdamW, trained: Sequence[Trained], learning_rate: float, fused: bool | None) -> TorchAdamW:
    groups: list[dict[str, Any]] = [
        {
            "params": [(one.name, one.parameter) for one in trained if one.is_matrix is matrices],
            "weight_decay": config.weight_decay if matrices else 0.0,
        }
        for matrices in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    return TorchAdamW(groups, lr=learning_rate, betas=betas, eps=config.eps, fused=fused)
