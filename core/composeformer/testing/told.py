"""What a pass forth and back through an ffn or a router tells, and how that of several batches is that of one.

Shapes: B rows, T tokens, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from composeformer.tensors import Aux
from composeformer.testing.bounds import size
from composeformer.testing.case import Case

# What there is one of for each token; of the rest there is one for all.
BY_TOKEN = ("output", "input")


class Told(NamedTuple):
    """What a pass forth and back tells: `gradients` has the output, too."""

    gradients: dict[str, Tensor]
    losses: dict[str, Tensor]
    counts: dict[str, Tensor]


def back(model: nn.Module, x: Tensor, output: Tensor, aux: Aux, cotangent: Tensor) -> Told:
    """Goes back through a pass from x, a leaf: the gradients of cotangent . output plus all losses."""
    losses = [each.sum() for each in aux.losses.values() if each.requires_grad]
    # A router without parameters has no gradient; a sum of nothing of x gives it one of zero.
    joined = output + x[..., :0].sum()
    torch.autograd.backward([joined, *losses], [cotangent.to(joined.dtype), *map(torch.ones_like, losses)])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return Told(
        {"output": output.detach(), "input": x.grad, **gradients},
        {name: each.detach().sum() for name, each in aux.losses.items()},
        dict(aux.counts),
    )


def added(every: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sums by name; what one has not is a zero there."""
    found: dict[str, Tensor] = {}
    for each in every:
        for name, tensor in each.items():
            found[name] = found[name] + tensor if name in found else tensor
    return found


def together(parts: Sequence[Told]) -> Told:
    """What several batches tell as one: outputs and inputs' gradients one after another, all else added."""
    by_row = {name: torch.cat([each.gradients[name] for each in parts]) for name in BY_TOKEN}
    rest = [{name: g for name, g in each.gradients.items() if name not in by_row} for each in parts]
    losses, counts = added([each.losses for each in parts]), added([each.counts for each in parts])
    return Told({**added(rest), **by_row}, losses, counts)


def alike(case: Case, found: Told, wanted: Told, what: str, tokens: int) -> None:
    """Gradients and losses within the bound, counts exactly; a gradient that one has not is a zero."""
    names = {**found.gradients, **wanted.gradients}
    zeros = {name: torch.zeros_like(each) for name, each in names.items()}
    case.close(zeros | found.gradients, zeros | wanted.gradients, what, terms=tokens)
    case.equal(sorted(found.losses), sorted(wanted.losses), f"{what}: the losses' names")
    case.equal(sorted(found.counts), sorted(wanted.counts), f"{what}: the counts' names")
    # The condition was measured of the output and the losses together.
    scale = max(size(wanted.gradients["output"]), size(wanted.losses))
    for name, loss in wanted.losses.items():
        case.close(found.losses[name], loss, f"{what}: the loss {name}", terms=tokens, scale=scale)
    for name, count in wanted.counts.items():
        case.equal(found.counts[name], count, f"{what}: the count {name}")


def shuffled(case: Case, label: str, count: int) -> Tensor:
    """A permutation of `count` things."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(case.integer(label, 0, 2**16)))


def ragged(case: Case, most: int, longest: int) -> Tensor:
    """Which tokens (B, T) are real: rows of unlike lengths, down to none, with padding anywhere."""
    lengths = case.integers("lengths", 0, longest, longest=most)
    width = max(lengths) + case.integer("more", 0, 3)
    if not width:
        case.draw.reject("there is no token")
    valid = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        valid[row, shuffled(case, f"places {row}", width)[:length]] = True
    return valid


def row_by_row(
    case: Case,
    tell: Callable[[Tensor, Tensor, Tensor], Told],
    found: Told,
    batch: tuple[Tensor, Tensor, Tensor],
    valid: Tensor,
) -> None:
    """What a padded batch told is what its rows tell, each by itself and without its padding.

    `tell(x, ids, cotangent)` asks the same of a batch without padding.
    """
    case.require(not bool(found.gradients["input"][~valid].any()), "padding has a gradient")
    x, ids, cotangent = batch
    alone = []
    for row, real in enumerate(valid.unbind()):
        if bool(real.any()):
            each = tell(x[row : row + 1, real], ids[row : row + 1, real], cotangent[row : row + 1, real])
            flat = {name: each.gradients[name][0] for name in BY_TOKEN}
            alone.append(each._replace(gradients={**each.gradients, **flat}))
    kept = {name: found.gradients[name][valid] for name in BY_TOKEN}
    if alone:
        found = found._replace(gradients={**found.gradients, **kept})
        alike(case, found, together(alone), "with padding", valid.numel())
        return
    rest = {name: tensor for name, tensor in found.gradients.items() if name not in BY_TOKEN}
    for name, tensor in {**rest, **found.losses, **found.counts}.items():
        case.require(not bool(tensor.any()), f"of padding alone {name} is not zero")
