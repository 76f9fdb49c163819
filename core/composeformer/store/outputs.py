"""What two models give for the same tokens: every part's output in the order of computation, and how far apart.

A difference is max|a - b| / max|b| over a tensor, b being the model that is trusted.
"""

from collections.abc import Callable
from math import inf, isfinite
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from composeformer.decoder import Model
from composeformer.errors import InputError
from composeformer.tensors import Routing


@attrs.frozen(kw_only=True)
class Difference:
    """`relative` is max|a - b| / max|b|; None where the two can not be subtracted, and `detail` says why."""

    where: str
    relative: float | None
    detail: str = ""

    def beyond(self, tolerance: float) -> bool:
        """Whether this is more than the tolerance, or no number."""
        return self.relative is None or not self.relative <= tolerance

    @property
    def told(self) -> str:
        """How far apart, in words that follow `differs`."""
        return self.detail or f"by {self.relative:.3g}"


def first_of(found: tuple[Difference, ...], tolerance: float) -> Difference | None:
    """The first that is more than the tolerance."""
    return next((each for each in found if each.beyond(tolerance)), None)


def sample(model: Model, against: Model, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random ids that both models know (2, T), and which of them are real: the second row is left-padded.

    Raises InputError for a length that compares nothing.
    """
    vocab = min(model.spec.model.vocab_size, against.spec.model.vocab_size)
    longest = min(model.spec.model.max_position_embeddings, against.spec.model.max_position_embeddings)
    length = min(tokens, longest)
    if length < 1:
        raise InputError(f"tokens = {tokens}: must be at least 1")
    ids = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, : length // 4] = False
    return ids, valid


class _Enough(Exception):
    """Ends a forward whose rest is not asked for."""


def outputs(
    model: Model, ids: Tensor, valid: Tensor, enough: Callable[[str, Tensor], bool] | None = None
) -> dict[str, Tensor]:
    """Every part's output by path, in the order of computation, the logits last; those before `enough(path, output)`
    was true, and that one, where it ever is.
    """
    kept: dict[str, Tensor] = {}
    hooks = []

    def keep(path: str, experts: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = (
                _routed(output, experts) if isinstance(output, Routing) else getattr(output, "hidden", output)
            )
            # A predictor calls the embedding and the head again; the model's own call comes first.
            if isinstance(hidden, Tensor) and path not in kept:
                kept[path] = hidden.detach().cpu()
                if enough is not None and path != "head" and enough(path, kept[path]):
                    raise _Enough

        return hook

    nodes = {node.path: node for node in model.spec.plan.nodes() if node.slot != "position"}
    for path, module in model.named_modules():
        if path in nodes:
            experts = nodes[path].site.sizes.get("num_experts", 0)
            hooks.append(module.register_forward_hook(keep(path, experts)))
    try:
        with torch.inference_mode():
            given = ids.to(model.device), valid.to(model.device)
            predict = model.predictor is not None
            logits = model(given[0], valid=given[1], phase="train", predict=predict).logits
    except _Enough:
        return kept
    finally:
        for hook in hooks:
            hook.remove()
    # The head's own output is the logits, told once under the name that users know.
    kept.pop("head", None)
    kept["logits"] = logits.cpu()
    return kept


def _routed(routing: Routing, experts: int) -> Tensor:
    """What each expert's output is multiplied by, (..., E): in whatever order a router names them."""
    weights = routing.weights.new_zeros(*routing.weights.shape[:-1], experts + 1)
    return weights.scatter_add(-1, routing.indices, routing.weights)[..., :experts]


def difference(path: str, a: Tensor | None, b: Tensor, valid: Tensor) -> Difference:
    """How far an output `a` is from the trusted one, where tokens are real."""
    if a is None:
        return Difference(where=path, relative=None, detail="only in the second")
    if a.shape != b.shape:
        return Difference(where=path, relative=None, detail=f"{tuple(a.shape)} against {tuple(b.shape)}")
    # What stands at padding is nobody's business; a predictor's outputs are of the first tokens alone.
    fits = a.shape[0] == valid.shape[0] and a.ndim > 1 and a.shape[1] <= valid.shape[1]
    real = valid[:, : a.shape[1]] if fits else torch.ones(a.shape[:2], dtype=torch.bool)
    return gap(path, a[real], b[real])


def gap(where: str, a: Tensor, b: Tensor) -> Difference:
    """How far one tensor is from another of its shape."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    infinite = [name for name, x in (("first", a), ("second", b)) if not bool(x.isfinite().all())]
    if infinite:
        told = f"is not finite in the {' and the '.join(infinite)}"
        return Difference(where=where, relative=None, detail=told)
    scale = float(b.abs().max()) if b.numel() else 0.0
    apart = float((a - b).abs().max()) if b.numel() else 0.0
    if apart and not isfinite(apart / scale if scale else inf):
        return Difference(where=where, relative=None, detail="is 0 everywhere in the second only")
    return Difference(where=where, relative=apart / scale if apart else 0.0)
