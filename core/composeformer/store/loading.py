"""A model folder, ours or Hugging Face's, becomes a built model: memory-mapped, straight to device and dtype."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from composeformer.assemble import coded, fill, skeleton
from composeformer.decoder import Model
from composeformer.dialects import find
from composeformer.errors import FolderError
from composeformer.folder import TensorInfo, WeightReader
from composeformer.folder import check_manifest as check_files
from composeformer.folder.paths import MANIFEST
from composeformer.spec import Spec
from composeformer.store.accounting import Tensors, read, telling
from composeformer.store.lock import NAME, check_lock, read_lock
from composeformer.store.saving import SPEC_NAME

MAX_CONFIG_BYTES = 16_000_000


def load(
    folder: "str | os.PathLike[str]",
    *,
    device: str = "cpu",
    dtype: str | None = None,
    check_hashes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model of a folder: one that `save` or `import_model` wrote, or a plain Hugging Face folder.

    Every tensor is accounted for. Raises FolderError or DialectError, a line for each finding.
    `check_hashes` reads all files against the manifest first.
    """
    root = Path(folder)
    spec, dialect = describe(root)
    if (root / SPEC_NAME).exists() and (problems := check_files(root, hashes=check_hashes)):
        raise FolderError(*problems)
    model = skeleton(spec, device=device, dtype=dtype)
    with WeightReader(root) as reader:
        fill(model, coded(model.spec, read(spec, dialect, reader, root)), device, progress)
    model.folder = root
    return model


def describe(root: Path) -> tuple[Spec, str]:
    """The spec of a folder and the dialect of its tensor names, without reading a weight."""
    if not root.is_dir():
        raise FolderError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    if (root / SPEC_NAME).exists():
        spec, lock = Spec.load(root / SPEC_NAME), read_lock(root)
        check_lock(root, spec, lock)
        return spec, lock["dialect"]
    check_plain(root)
    config = read_config(root)
    with WeightReader(root) as reader:
        with telling(root / "config.json"):
            dialect = find(config)
            document = dialect.to_spec(config, shapes(reader))
        spec = Spec.from_dict(document, label=str(root / "config.json"))
        return as_stored(spec, reader.names()), dialect.name


def check_plain(root: Path) -> None:
    """Raises FolderError for a folder of ours whose spec is lost: nothing else of it would be checked."""
    manifest = root / MANIFEST
    ours = [name for name in (NAME, MANIFEST) if (root / name).is_file()]
    # Other tools write files called manifest.json too.
    if ours == [MANIFEST] and f'"{SPEC_NAME}"'.encode() not in manifest.read_bytes()[:MAX_CONFIG_BYTES]:
        return
    if ours:
        raise FolderError(
            f"{root}: {SPEC_NAME} is missing: {' and '.join(ours)} say that this is a model folder of"
            " composeformer; restore it, or remove them to read the folder as a plain Hugging Face one"
        )


def as_stored(spec: Spec, found: Mapping[str, TensorInfo]) -> Spec:
    """The spec in the dtype that most elements of a source have."""
    sizes: dict[torch.dtype, int] = {}
    for info in found.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + torch.Size(info.shape).numel()
    if not sizes:
        return spec
    most = max(sizes, key=lambda dtype: sizes[dtype])
    name = str(most).removeprefix("torch.")
    if (
        name == "float32"
        or name not in ("bfloat16", "float16", "float64")
        or "precision" in spec.document.data
    ):
        return spec
    return spec.with_(precision={"kind": spec.single("precision").kind, "dtype": name})


def shapes(source: Tensors) -> dict[str, tuple[int, ...]]:
    """The shapes of a source's tensors by their names."""
    return {name: tuple(info.shape) for name, info in source.names().items()}


def read_config(root: Path) -> dict[str, Any]:
    """A folder's config.json as plain data. Raises FolderError."""
    path = root / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise FolderError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{root}: neither spec.toml nor config.json: not a model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path}: can not be read: {error}") from None
    if not isinstance(config, dict):
        raise FolderError(f"{path}: must be a JSON object")
    return config


def open_any(
    path: "str | os.PathLike[str]",
    *,
    check_hashes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model of a folder, or of a GGUF file without writing a folder."""
    where = Path(path)
    if where.is_dir() or not where.exists():
        return load(where, check_hashes=check_hashes, progress=progress)
    from composeformer.gguf import open_gguf

    with open_gguf(where) as file:
        with telling(where):
            dialect = find(file.metadata)
            document = dialect.to_spec(file.metadata, shapes(file), file.get)
        model = skeleton(Spec.from_dict(document, label=str(where)))
        fill(model, coded(model.spec, read(model.spec, dialect.name, file, where)), "cpu", progress)
    return model
