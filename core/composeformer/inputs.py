"""What a forward may be given: each wrong argument is told in one line.

Shapes and dtypes cost nothing to look at. Values are looked at where the tokens are on the CPU; on any other
device that would make the host wait for it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from composeformer.contracts import PHASES
from composeformer.errors import InputError, one_of, show


def check_integers(what: str, found: object, rows: int | None = None) -> None:
    """Raises InputError unless `found` is a tensor of integers of shape (rows,), or of any length for None."""
    shape = f"({'N' if rows is None else rows},)"
    if not isinstance(found, Tensor):
        raise InputError(f"{what}: must be a tensor of integers of shape {shape}, found {told(found)}")
    right = found.ndim == 1 and (rows is None or len(found) == rows)
    if not right or not is_integer(found.dtype):
        raise InputError(f"{what}: must be integers of shape {shape}, found {told(found)}")


def check_counts(least: Mapping[str, int], found: Mapping[str, object]) -> None:
    """Raises InputError unless each of `found` is an integer of at least what `least` says of its name."""
    for name, value in found.items():
        if type(value) is not int or value < least[name]:
            raise InputError(f"{name} = {show(value)}: must be an integer >= {least[name]}")


def check_forward(
    ids: object,
    positions: object,
    documents: object,
    valid: object,
    phase: object,
    vocab_size: int,
    limit: int,
) -> None:
    """Raises InputError for whatever is wrong about the arguments of a forward, the cache aside."""
    if not isinstance(ids, Tensor):
        raise InputError(f"token ids: must be a tensor of int64 of shape (B, T), found {told(ids)}")
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise InputError(f"token ids must be int64 of shape (B, T), got {ids.dtype} {tuple(ids.shape)}")
    if not ids.shape[1]:
        raise InputError("token ids: there are none, T is 0")
    if ids.shape[1] > limit:
        raise InputError(f"{ids.shape[1]} tokens exceed max_position_embeddings ({limit})")
    _like(ids, "positions", positions, "integers")
    _like(ids, "documents", documents, "integers")
    _like(ids, "valid", valid, "bool")
    if phase is not None and phase not in PHASES:
        raise InputError(f"phase = {show(phase)}: must be one of {one_of(PHASES)}")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        real = valid if isinstance(valid, Tensor) else None
        _within(ids, real, "token id", vocab_size)
        if isinstance(positions, Tensor):
            _within(positions, real, "position", limit)


def _like(ids: Tensor, what: str, found: object, kind: str) -> None:
    if found is None:
        return
    shape = tuple(ids.shape)
    if not isinstance(found, Tensor):
        raise InputError(f"{what}: must be a tensor of {kind} of shape {shape}, found {told(found)}")
    right = found.dtype == torch.bool if kind == "bool" else is_integer(found.dtype)
    if not right or tuple(found.shape) != shape:
        raise InputError(f"{what}: must be {kind} of shape {shape}, found {told(found)}")
    if found.device != ids.device:
        raise InputError(f"{what}: must be on {ids.device} like the token ids, found on {found.device}")


def _within(values: Tensor, valid: Tensor | None, what: str, limit: int) -> None:
    wrong = (values < 0) | (values >= limit)
    if what == "position" and valid is not None:
        wrong &= valid
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        found = int(values[row, place])
        where = f"row {row}, place {place}" if what == "position" else f"row {row}, position {place}"
        raise InputError(f"{what} {found} at {where}: must be 0 to {limit - 1}")


def is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def told(found: object) -> str:
    """A wrong argument in few words."""
    if isinstance(found, Tensor):
        return f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}"
    return type(found).__name__
