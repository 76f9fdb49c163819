"""A built model becomes a model folder: a Hugging Face folder with a spec, a lock and a manifest beside."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from composeformer.decoder import Model
from composeformer.dialects import Dialect, expressing
from composeformer.dialects.transfer import Lookup
from composeformer.errors import DialectError, InputError
from composeformer.folder import new_folder, write_json, write_manifest, write_shards, write_text
from composeformer.parallel.gathering import Get, lead
from composeformer.spec import Spec
from composeformer.store.lock import NAME, NATIVE, lock_text

SPEC_NAME = "spec.toml"
Extra = Callable[[Path], object]


def save(
    model: Model,
    target: "str | os.PathLike[str]",
    *,
    tokenizer: Extra | None = None,
    replace: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Writes a model to a folder, whole or not at all; returns the dialect of its tensor names, or `native`.

    `tokenizer(folder)` may add tokenizer files before the folder appears. Over several processes all call this, the
    first writes what one process would, byte for byte, and all return when it is done. Raises FolderError where the
    target is in the way, in every process.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if any(tensor.is_meta for tensor in state.values()):
        raise InputError("a model on the meta device has no values to save")
    spec = model.spec
    found: Dialect | None = None
    config: Mapping[str, Any] = {}
    try:
        found, config = expressing(spec)
    except DialectError:
        aliases = spec.formats.aliases
    else:
        config = {**config, "dtype": str(model.activations).removeprefix("torch.")}

    def work(get: Get) -> None:
        if found is None:
            tensors: Iterable[tuple[str, Tensor]] = ((name, get(name)) for name in state if name not in aliases)
        else:
            tensors = found.write(spec, Lookup(get))
        total = len(spec.plan.tensors)
        write(spec, found, config, tensors, target, tokenizer, replace, max_shard_bytes, progress, total)

    lead(model.placement, state, work)
    return NATIVE if found is None else found.name


def write(
    spec: Spec,
    dialect: Dialect | None,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    target: "str | os.PathLike[str]",
    tokenizer: Extra | None,
    replace: bool,
    max_shard_bytes: int,
    progress: Callable[[int, int], None] | None,
    total: int,
) -> str:
    """The folder of a spec and its tensors, named as `dialect` names them; returns the dialect's name."""
    aliases = spec.formats.aliases if dialect is None else {}
    kept = ((name, tensor) for name, tensor in tensors if name not in aliases)
    name = NATIVE if dialect is None else dialect.name
    with new_folder(Path(target), replace=replace) as folder:
        if tokenizer is not None:
            tokenizer(folder)
        write_shards(
            folder, counted(kept, total, progress), max_shard_bytes=max_shard_bytes, metadata={"format": "pt"}
        )
        if dialect is not None:
            write_json(folder / "config.json", config)
        write_text(folder / SPEC_NAME, spec.to_toml())
        write_text(folder / NAME, lock_text(spec, name))
        write_manifest(folder)
    return name


def counted(
    tensors: Iterable[tuple[str, Tensor]], total: int, progress: Callable[[int, int], None] | None
) -> Iterable[tuple[str, Tensor]]:
    """The same tensors, telling `progress` of each."""
    for done, pair in enumerate(tensors, 1):
        yield pair
        if progress is not None:
            progress(min(done, total), total)


__all__ = ["SPEC_NAME", "counted", "save", "write"]
