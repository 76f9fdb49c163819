"""Values for a model on the meta device: each tensor by name, an alias together with what it is.

Over several processes each gives its own part of a tensor that is cut by expert, and the whole of one that is
sharded, of which it keeps its shard.
"""

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from composeformer.errors import InputError, join, nearest, one_of
from composeformer.parallel.pieces import like, local
from composeformer.parallel.world import size

Places = dict[int, tuple[Tensor, list[tuple[str, nn.Module, str]]]]


def fill(
    model: nn.Module,
    values: Iterable[tuple[str, Tensor]],
    device: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Gives every parameter and buffer its value, on `device` and in the model's dtype; aliases stay aliases.

    `progress(done, total)` counts tensors. Raises InputError for a name that the model does not have, a
    second value, another shape, or tensors without a value; and before anything is taken for a model that is
    larger than the device's memory.
    """
    open_places = places(model)
    check_room(open_places, device)
    names = {name: key for key, (_, owners) in open_places.items() for name, _, _ in owners}
    total = len(open_places)
    for name, value in values:
        if name not in names:
            near = nearest(name, names)
            hint = f"; did you mean {near!r}?" if near else ""
            raise InputError(f"{name}: the model has no tensor of this name{hint}")
        if names[name] not in open_places:
            raise InputError(f"{name}: has its value already, by this name or that of an alias")
        old, owners = open_places.pop(names[name])
        if tuple(value.shape) != tuple(old.shape):
            raise InputError(f"{name}: has shape {tuple(value.shape)}, the model wants {tuple(old.shape)}")
        data = like(old, value, device)
        new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
        for _, module, attribute in owners:
            setattr(module, attribute, new)
        if progress is not None:
            progress(total - len(open_places), total)
    if open_places:
        raise InputError(f"no value given for {one_of(owners[0][0] for _, owners in open_places.values())}")


def check_room(found: Places, device: str) -> None:
    """Raises InputError for tensors that the device's whole memory can not hold, with those of all processes of this
    machine where they share it.
    """
    needed = sum(local(tensor).nbytes for tensor, _ in found.values())
    there, sharing = memory(device), neighbours(device)
    if there is not None and needed * sharing > there:
        each = "" if sharing == 1 else f" in each of {sharing} processes"
        sizes = f"{needed / 1e9:,.1f} GB of tensors{each} are more than the {there / 1e9:,.1f} GB of {device}"
        raise InputError(f"{sizes}; on the device meta a model has shapes only")


def memory(device: str) -> int | None:
    """Bytes of memory that a device has in all, None where nothing tells."""
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if kind != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def neighbours(device: str) -> int:
    """How many processes share a device's memory: as torchrun says for a machine's own, one for any other."""
    shared = torch.device(device).type == "cpu" and size() > 1
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if shared else 1


def places(model: nn.Module) -> Places:
    """Every distinct tensor by identity, with all places where it stands: full name, module, attribute."""
    found: Places = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners = found.setdefault(id(tensor), (tensor, []))[1]
                owners.append((join(path, attribute), module, attribute))
    return found
