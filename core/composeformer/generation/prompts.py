"""Prompts as token ids, checked before any reaches a model: not empty, known ids, room to continue."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from composeformer.errors import InputError, show

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Int[Tensor, "B T"]


class TextStream(Protocol):
    """Decodes ids as they come; the pieces joined are the text of all of them."""

    def push(self, index: int, /) -> str: ...

    def finish(self) -> str: ...


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; `composeformer.text.Tokenizer` is one."""

    @property
    def eos_ids(self) -> Sequence[int]: ...

    def encode(self, text: str, /) -> list[int]: ...

    def stream(self, skip_special: bool = False) -> TextStream: ...


def read_prompts(
    prompts: Prompts, tokenizer: Tokenizer | None, vocab_size: int, limit: int, what: str, least: int = 1
) -> list[list[int]]:
    """The ids of each prompt, at least so many; `limit` is the most tokens a row may come to, and `what` its name.

    Raises InputError with one line for each prompt that can not be served.
    """
    several = _several(prompts)
    if len(several) < least:
        raise InputError("there is no prompt")
    rows, wrong = [], []
    for index, prompt in enumerate(several):
        where = "prompt" if len(several) == 1 else f"prompt {index}"
        try:
            ids = _ids(prompt, tokenizer)
            reason = _refusal(ids, vocab_size, limit, what)
        except InputError as error:
            ids, reason = [], str(error)
        rows.append(ids)
        wrong += [f"{where}: {reason}"] if reason is not None else []
    if wrong:
        raise InputError(*wrong)
    return rows


def _several(prompts: object) -> list[object]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (1, 2) or prompts.dtype not in (torch.int64, torch.int32):
            found = f"{str(prompts.dtype).removeprefix('torch.')} {tuple(prompts.shape)}"
            raise InputError(f"prompts: a tensor must hold integer ids (B, T), found {found}")
        return list(prompts.tolist() if prompts.ndim == 2 else [prompts.tolist()])
    if not isinstance(prompts, Sequence):
        raise InputError(f"prompts: must be text, ids or several of either, found {type(prompts).__name__}")
    if prompts and all(type(element) is int for element in prompts):
        return [list(prompts)]
    return [element.tolist() if isinstance(element, Tensor) else element for element in prompts]


def _ids(prompt: object, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("text needs a tokenizer, and this model has none; give token ids")
        return tokenizer.encode(prompt)
    if not isinstance(prompt, Sequence):
        raise InputError(f"must be text or a list of token ids, found {type(prompt).__name__}")
    return list(prompt)


def _refusal(ids: list[int], vocab_size: int, limit: int, what: str) -> str | None:
    """Why a prompt can not be continued, or None."""
    if not ids:
        return "is empty: it has no tokens"
    for position, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            return f"token {show(token)} at position {position}: must be an id from 0 to {vocab_size - 1}"
    if len(ids) >= limit:
        return f"{len(ids)} tokens leave no room to continue: {what} is {limit}"
    return None
