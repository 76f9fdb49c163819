"""AdamW whose moments have a dtype of their own: narrower than the weights, or wider.

    m = b1 m + (1 - b1) g       v = b2 v + (1 - b2) g^2       w -= lr (m' / (sqrt(v') + eps) + decay w)

with m' and v' free of their start's bias (arXiv 1711.05101, algorithm 2). DeepSeek-V3 keeps both moments in BF16 and
the masters in FP32 (arXiv 2412.19437, section 3.3.3). A step is computed in fp32, or fp64 for such weights, and uses
m and v before they are rounded to be kept.

In bf16, v follows a change only where (1 - b2) of it is more than half a unit of its eighth binary digit: about
b2 <= 0.99. V3 has 0.95; with 0.999 v would stay where it is.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

KEPT = ("exp_avg", "exp_avg_sq")


class MomentAdamW(Optimizer):
    """AdamW; each group states `moment`, the name of the dtype in which its moments are kept."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "moment": "float32"}
        super().__init__(groups, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, but moments come in the dtype of their group here, not the weights' or the saved one's."""
        own = [group["moment"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, moment, saved in zip(self.param_groups, own, state_dict["param_groups"], strict=True):
            group["moment"] = moment
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                # PyTorch has cast them to the weights' dtype by now, which may have lost bits.
                whole = state_dict["state"].get(key, {})
                for name in KEPT:
                    if name in whole:
                        kept = torch.empty_like(parameter, dtype=_dtype(group))
                        self.state[parameter][name] = kept.copy_(whole[name])

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({key: torch.zeros_like(parameter, dtype=_dtype(group)) for key in KEPT})
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise RuntimeError("AdamW takes dense gradients only")
        gradient = parameter.grad.to(wide)
        mean = state["exp_avg"].to(wide).mul_(beta1).add_(gradient, alpha=1 - beta1)
        square = state["exp_avg_sq"].to(wide).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        divisor = square.sqrt().div_(sqrt(1 - beta2**step)).add_(group["eps"])
        value = parameter.to(wide).mul(1 - group["lr"] * group["weight_decay"])
        parameter.copy_(value.addcdiv_(mean, divisor, value=-group["lr"] / (1 - beta1**step)))


def _dtype(group: dict[str, Any]) -> torch.dtype:
    found: torch.dtype = getattr(torch, group["moment"])
    return found
