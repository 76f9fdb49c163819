"""Import and export: from Hugging Face folders and GGUF files, to plain Hugging Face folders, bit for bit."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from composeformer.costs import checkpoint
from composeformer.dialects import Dialect, expressing, find
from composeformer.dialects.codings import TABLE
from composeformer.dialects.codings import find as find_coding
from composeformer.dialects.transfer import Lookup
from composeformer.errors import DialectError, FolderError, InputError
from composeformer.folder import WeightReader, new_folder, write_json, write_shards
from composeformer.lazy import available
from composeformer.spec import Spec
from composeformer.spec.document import printable
from composeformer.store.accounting import lookup, telling
from composeformer.store.loading import check_weights, describe, opened, read_config, shapes
from composeformer.store.lock import NATIVE
from composeformer.store.saving import SPEC_NAME, counted, write
from composeformer.text import Tokenizer, copy_tokenizer

Progress = Callable[[int, int], None] | None


def import_model(
    source: "str | os.PathLike[str]",
    target: "str | os.PathLike[str]",
    *,
    weights: str | None = None,
    replace: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    progress: Progress = None,
) -> Spec:
    """Writes a model folder from a Hugging Face folder or a GGUF file; returns its spec.

    Tensors keep the dtype in which the source stores them. `weights` says what becomes of those that it stores as
    codes: `keep` codes and scales as they are, or decode them to `bfloat16` (the default) or `float32`; GGUF blocks
    are always decoded to float32. Memory holds one shard that is read, one that is written, and a tensor. Raises
    DialectError where no dialect reads the source, FolderError where it is damaged.
    """
    path = Path(source)
    check_weights(weights)
    check_apart(path, Path(target))
    if path.is_dir():
        return _from_folder(path, target, weights, replace, max_shard_bytes, progress)
    if not path.exists():
        raise FolderError(f"{path}: no such file or folder")
    if weights not in (None, "float32"):
        raise InputError(f"weights = {weights}: blocks of GGUF are decoded to float32 only")
    return _from_gguf(path, target, replace, max_shard_bytes, progress)


def _from_folder(
    root: Path, target: Any, weights: str | None, replace: bool, max_shard_bytes: int, progress: Progress
) -> Spec:
    if (root / SPEC_NAME).exists():
        raise FolderError(f"{root}: is a model folder of composeformer already")
    with opened(root, weights, one_file=True) as found:
        spec = found.spec
        if "name" not in spec.document.data:
            spec = spec.with_({"name": _name(root.resolve().name)})
        get = lookup(spec, found.dialect, found.source, root)
        config = read_config(root)
        carried = _carried(config)
        if found.stated is not None:
            carried[TABLE] = config[TABLE]
        return _write(
            spec,
            get,
            carried,
            found.dialect,
            target,
            lambda folder: tokenizer_from(root, folder, copy_tokenizer(root, folder)),
            replace,
            max_shard_bytes,
            progress,
        )


def _from_gguf(path: Path, target: Any, replace: bool, max_shard_bytes: int, progress: Progress) -> Spec:
    from composeformer.gguf import open_gguf
    from composeformer.gguf.tokenizer import write_tokenizer

    with open_gguf(path) as file:
        with telling(path):
            dialect = find(file.metadata)
            document = dialect.to_spec(file.metadata, shapes(file), file.get)
        document.setdefault("name", _name(path.stem))
        spec = Spec.from_dict(document, label=str(path))
        get = lookup(spec, dialect.name, file, path)
        carried = _special_ids(file.metadata)
        return _write(
            spec,
            get,
            carried,
            dialect.name,
            target,
            lambda folder: tokenizer_from(path, folder, write_tokenizer(file.metadata, folder)),
            replace,
            max_shard_bytes,
            progress,
        )


def _write(
    spec: Spec,
    get: Lookup,
    carried: Mapping[str, Any],
    family: str,
    target: Any,
    tokenizer: Callable[[Path], object],
    replace: bool,
    max_shard_bytes: int,
    progress: Progress,
) -> Spec:
    found: Dialect | None
    named: Iterable[tuple[str, Tensor]]
    try:
        found, config = expressing(spec, family)
    except DialectError:
        found, config = None, {}
        named = ((name, get(name)) for name in spec.formats.stored)
    else:
        config = {**config, **carried}
        config.setdefault("dtype", spec.formats.activations)
        named = found.write(spec, get)
    write(
        spec,
        found,
        config,
        named,
        target,
        tokenizer,
        replace,
        max_shard_bytes,
        progress,
        checkpoint(spec).tensors,
    )
    return spec


def check_apart(source: Path, target: Path) -> None:
    """Raises FolderError where writing `target` would touch what is read: neither may hold the other."""
    one, other = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if one == other:
        raise FolderError(f"{target}: is the source itself; write to another folder")
    if one.is_relative_to(other):
        raise FolderError(f"{target}: holds the source {source}; write to another folder")
    if other.is_relative_to(one):
        raise FolderError(f"{target}: lies in the source {source}; write to another folder")


def tokenizer_from(source: Path, folder: Path, _: object) -> None:
    """Raises FolderError, naming the source, where the tokenizer that was put into `folder` is none."""
    if not (folder / "tokenizer.json").exists() or not available("tokenizers"):
        return
    try:
        Tokenizer(folder)
    except FolderError as error:
        place = f"{source}{os.sep}" if source.is_dir() else f"{source}: "
        raise FolderError(*(line.replace(f"{folder}{os.sep}", place) for line in error.lines)) from error


def _name(found: str) -> str:
    return printable(found) or "model"


def _carried(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says beside the architecture and is worth keeping."""
    return {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(key) is not None
    }


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    keys = {
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "padding_token_id": "pad_token_id",
    }
    found = {ours: metadata.get(f"tokenizer.ggml.{theirs}") for theirs, ours in keys.items()}
    return {key: value for key, value in found.items() if isinstance(value, int)}


def export_model(
    source: "str | os.PathLike[str]",
    target: "str | os.PathLike[str]",
    *,
    replace: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    progress: Progress = None,
) -> str:
    """Writes a plain Hugging Face folder that transformers loads; returns the dialect's name.

    Raises DialectError, with the reasons, where no dialect can express the model.
    """
    root = Path(source)
    check_apart(root, Path(target))
    spec, dialect = describe(root)
    with telling(root):
        found, config = expressing(spec, dialect)
    if dialect != NATIVE and (root / "config.json").exists():
        old = read_config(root)
        config = {
            **config,
            **_carried(old),
            **{key: old[key] for key in ("dtype", "torch_dtype") if key in old},
        }
        if TABLE in config and TABLE in old:
            config[TABLE] = _as_worded(config[TABLE], old[TABLE])
    with WeightReader(root, one_file=True) as reader:
        get = lookup(spec, dialect, reader, root)
        with new_folder(Path(target), replace=replace) as folder:
            copy_tokenizer(root, folder)
            named = counted(found.write(spec, get), checkpoint(spec).tensors, progress)
            write_shards(folder, named, max_shard_bytes=max_shard_bytes, metadata={"format": "pt"})
            write_json(folder / "config.json", config)
    return found.name


def _as_worded(table: Any, old: Any) -> Any:
    """What is said of codes in the words of the source, where these mean the same."""
    try:
        same = find_coding(table).meaning == find_coding(old).meaning
    except DialectError:
        return table
    return old if same else table
