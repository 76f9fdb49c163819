"""What processes must have in common before a step: as many micro-batches, and rows that a predictor reaches into.

All run the same collectives, so all must run the same parts as often. Tokens may differ in number; who has none
brings padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from composeformer.decoder import Model
from composeformer.errors import InputError
from composeformer.inputs import check_forward
from composeformer.train.batch import TokenBatch


def met(model: Model, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """This process's batches, padded where others' are long enough for predictions and its own are not.

    Raises InputError in every process where they bring different numbers of batches, or one of them a batch that no
    forward takes.
    """
    world = model.placement.world
    if world.size == 1:
        return list(batches)
    wrong = _wrong(model, batches)
    told = torch.tensor([len(batches), -len(batches), int(wrong is not None)], device=world.device)
    most, least, refused = world.largest(told).tolist()
    if refused:
        lines = enumerate(world.every(wrong or ""))
        raise InputError(*(f"process {rank}: {line}" for rank, line in lines if line))
    if most != -least:
        number = f"between {-least} and {most} micro-batches"
        raise InputError(f"processes bring {number} to a step: must be the same number, of padding where need be")
    ahead = getattr(model.predictor, "num_drafts", 0)
    if not ahead:
        return list(batches)
    lengths = torch.tensor([batch.ids.shape[1] for batch in batches], device=world.device)
    longest = world.largest(lengths).tolist()
    return [batch.padded(min(ahead + 1, there)) for batch, there in zip(batches, longest, strict=True)]


def _wrong(model: Model, batches: Sequence[TokenBatch]) -> str | None:
    """What a forward would refuse. Told by one process alone, it would leave the others waiting for its tokens."""
    sizes = model.spec.model
    try:
        for ids, valid, documents, positions in batches:
            check_forward(
                ids, positions, documents, valid, "train", sizes.vocab_size, sizes.max_position_embeddings
            )
    except InputError as error:
        return str(error)
    return None


def summed(model: Model, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the tokens of all processes."""
    if model.placement.world.size == 1:
        return weight, tokens
    both = model.placement.world.sum(torch.stack([weight.double(), tokens.double()]))
    return both[0].to(weight.dtype), both[1].to(tokens.dtype)
