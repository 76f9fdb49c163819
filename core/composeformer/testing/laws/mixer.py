"""Laws of mixers: what a query sees, and that a cache changes nothing.

Shapes: B rows, T tokens, D features.
"""

from typing import Any

import torch
from torch import Tensor

from composeformer.decoder import Model
from composeformer.testing.case import Case
from composeformer.testing.law import law

LONGEST = 9


def mix(case: Case, model: Model, x: Tensor, **batch: Any) -> Tensor:
    """The mixer of a model over x (B, T, D) as a layer calls it; `batch` is what the model would be told."""
    cache = batch.pop("cache", None)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    found: Tensor = case.part_of(model)(x, model.batch(ids, **batch), cache).hidden
    return found


def settled(case: Case, rows: int, tokens: int) -> Tensor:
    """A stream to mix, at which the case's condition is known."""
    x = case.stream("x", rows, tokens)
    case.settle(lambda model, y: mix(case, model, y), x)
    return x


@law("mixer", "causal", "a later token changes no earlier output", kills="mask-lets-the-next-token-in")
def causal(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 2), case.integer("tokens", 2, LONGEST)
    changed = case.integer("changed", 1, tokens - 1)
    x = settled(case, rows, tokens)
    y = x.clone()
    y[:, changed:] = 10 * case.stream("y", rows, tokens - changed)
    with torch.no_grad():
        before, after = mix(case, case.model, x), mix(case, case.model, y)
    case.close(after[:, :changed], before[:, :changed], "outputs before the changed token", terms=tokens)
