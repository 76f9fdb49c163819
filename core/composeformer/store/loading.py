"""A model folder, ours or Hugging Face's, becomes a built model: memory-mapped, straight to device and dtype."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

from composeformer.assemble import coded, fill, in_dtype, skeleton
from composeformer.decoder import Model
from composeformer.dialects import find
from composeformer.dialects.codings import TABLE, Stated, of_codec
from composeformer.errors import FolderError, InputError, nearest, one_of, show
from composeformer.folder import TensorInfo, WeightReader
from composeformer.folder import check_manifest as check_files
from composeformer.folder.paths import MANIFEST
from composeformer.spec import Spec
from composeformer.store.accounting import Tensors, read, telling
from composeformer.store.decoding import Decoded, Held, found
from composeformer.store.keeping import kept
from composeformer.store.lock import NAME, NATIVE, check_lock, read_lock
from composeformer.store.saving import SPEC_NAME
from composeformer.tensors import DTYPES

log = logging.getLogger(__name__)

KEEP = "keep"
WEIGHTS = (KEEP, "bfloat16", "float32")

MAX_CONFIG_BYTES = 16_000_000


def load(
    folder: "str | os.PathLike[str]",
    *,
    device: str = "cpu",
    dtype: str | None = None,
    weights: str | None = None,
    check_hashes: bool = False,
    overrides: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model of a folder: one that `save` or `import_model` wrote, or a plain Hugging Face folder.

    Every tensor is accounted for. `weights` says what becomes of weights that are stored as codes: `keep` them, or
    decode them to `bfloat16` or `float32`; by default a folder of ours is as its spec says, and a Hugging Face one is
    decoded to `dtype`, or bfloat16. Raises FolderError or DialectError, a line for each finding. `check_hashes` reads
    all files against the manifest first. `overrides` are settings of how it is run, such as `parallel.expert=2`; under
    a `precision` that stores weights as other codes they are encoded anew. Over several processes each reads the
    experts that it holds.
    """
    root = Path(folder)
    if weights is None and dtype is not None and not (root / SPEC_NAME).exists():
        weights = "bfloat16" if dtype == "bfloat16" else "float32"
    with _opened_to_run(root, weights, overrides, dtype) as (found, spec):
        if (root / SPEC_NAME).exists() and (problems := check_files(root, hashes=check_hashes)):
            raise FolderError(*problems)
        model = skeleton(spec, device=device)
        stored = model.spec if _codecs(spec) == _codecs(found.spec) else found.spec
        values = read(stored, found.dialect, found.source, root, model.placement.groups)
        fill(model, coded(model.spec, values), device, progress)
    model.folder = root
    return model


@contextmanager
def _opened_to_run(
    root: Path, weights: str | None, overrides: Iterable[str], dtype: str | None
) -> "Iterator[tuple[Opened, Spec]]":
    """The folder, and the spec it is run by; decoded where that spec stores weights as other codes."""
    with opened(root, weights) as found:
        spec = run(found.spec, overrides)
        if dtype is not None:
            spec = in_dtype(spec, dtype)
        if not found.spec.formats.coded or _codecs(spec) == _codecs(found.spec):
            yield found, spec
            return
    with opened(root, "float32") as found:
        yield found, spec


def _codecs(spec: Spec) -> dict[str, str | None]:
    """Which weights a spec stores as codes, and of which codec."""
    return {name: spec.formats.tensors[name].codec for name in spec.formats.coded}


def run(spec: Spec, overrides: Iterable[str]) -> Spec:
    """The spec run in another way. Raises InputError for settings that make it another model."""
    found = spec.overridden(tuple(overrides))
    if found.fingerprint != spec.fingerprint:
        told = "these change the model; a folder's can only be run in another way (parallel, comm, precision, train)"
        raise InputError(f"overrides = {one_of(overrides)}: {told}")
    return found


@attrs.frozen(kw_only=True)
class Opened:
    """A folder that is open: its spec, the dialect of its names, and its tensors as that spec wants them.

    `stated` is what a plain folder's config says of codes, where they are kept.
    """

    spec: Spec
    dialect: str
    source: Tensors
    stated: Stated | None = None


@contextmanager
def opened(root: Path, weights: str | None = None, *, one_file: bool = False) -> Iterator[Opened]:
    """The folder while it is open. `weights` as in `load`, `one_file` as in `WeightReader`.

    Raises FolderError or DialectError for what is no folder of a model, and for codes that can not be read.
    """
    check_weights(weights)
    if not root.is_dir():
        raise FolderError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    if (root / SPEC_NAME).exists():
        spec, lock = Spec.load(root / SPEC_NAME), read_lock(root)
        check_lock(root, spec, lock)
        with WeightReader(root, one_file=one_file) as reader:
            yield _ours(spec, lock["dialect"], reader, weights)
        return
    check_plain(root)
    config = read_config(root)
    with WeightReader(root, one_file=one_file) as reader:
        yield _theirs(config, reader, weights)


def _ours(spec: Spec, dialect: str, reader: WeightReader, weights: str | None) -> Opened:
    """A folder of ours, as its spec says or decoded."""
    if weights in (None, KEEP) or not spec.formats.coded:
        return Opened(spec=spec, dialect=dialect, source=reader)
    formats = spec.formats
    held: dict[str, Held] = {}
    for name, parts in formats.coded.items():
        kind = str(formats.tensors[name].codec)
        if dialect == NATIVE:
            held[name] = Held(kind, tuple(formats.stored[part] for part in parts))
        elif kind not in {each.codec for each in held.values()}:
            held |= found(reader, of_codec(kind))
    source = Decoded(reader, held, DTYPES[str(weights)])
    return Opened(spec=in_full(spec, str(weights)), dialect=dialect, source=source)


def _theirs(config: Mapping[str, Any], reader: WeightReader, weights: str | None) -> Opened:
    """A Hugging Face folder."""
    root = reader.folder
    with telling(root / "config.json"):
        dialect = find(config)
        document = dialect.to_spec(config, shapes(reader))
        stated = dialect.stated(config)
    spec = Spec.from_dict(document, label=str(root / "config.json"))
    held = {} if stated is None else found(reader, stated.coding, stated)
    if stated is not None and not held:
        told = f"{TABLE} tells of {stated.coding.codes} codes, but no tensor is stored so; weights are read as they are"
        log.warning("%s: %s", root / "config.json", told)
    if stated is None or not held:
        return Opened(spec=as_stored(spec, reader.names()), dialect=dialect.name, source=reader)
    if weights == KEEP:
        with telling(root):
            kept_spec = kept(spec, dialect, stated, held, reader)
        return Opened(spec=kept_spec, dialect=dialect.name, source=reader, stated=stated)
    source = Decoded(reader, held, DTYPES[weights or "bfloat16"])
    # What was asked for in float32 is not rounded again because most of a folder is narrower.
    decoded = in_full(spec, weights) if weights == "float32" else as_stored(spec, source.names())
    return Opened(spec=decoded, dialect=dialect.name, source=source)


def describe(root: Path, weights: str | None = None) -> tuple[Spec, str]:
    """The spec of a folder and the dialect of its tensor names, without reading a weight."""
    if (root / SPEC_NAME).exists() and weights is None:
        spec, lock = Spec.load(root / SPEC_NAME), read_lock(root)
        check_lock(root, spec, lock)
        return spec, lock["dialect"]
    with opened(root, weights) as found:
        return found.spec, found.dialect


def check_weights(weights: str | None) -> None:
    """Raises InputError for a word that says nothing of what becomes of codes."""
    if weights is not None and weights not in WEIGHTS:
        near = nearest(weights, WEIGHTS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"weights = {show(weights)}: must be one of {one_of(WEIGHTS)}{hint}")


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
    return in_full(spec, name)


def in_full(spec: Spec, dtype: str) -> Spec:
    """The spec with the default precision policy in this dtype, and no rules."""
    default = spec.registry.default("precision")
    assert default is not None, "a spec without a default has a precision of its own, or is none"
    # Under its own kind a policy keeps what is not set anew.
    rules: dict[str, Any] = {"rules": []} if spec.formats.rules else {}
    return spec.with_({"precision": {"kind": default.kind, "dtype": dtype, **rules}})


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


def like(model: Model) -> str:
    """What becomes of another folder's codes where its model is compared with this one: what became of its own."""
    if model.spec.formats.coded:
        return KEEP
    return "bfloat16" if model.activations == torch.bfloat16 else "float32"


def open_any(
    path: "str | os.PathLike[str]",
    *,
    weights: str | None = None,
    check_hashes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model of a folder, or of a GGUF file without writing a folder. `weights` as in `load`."""
    where = Path(path)
    if where.is_dir() or not where.exists():
        return load(where, weights=weights, check_hashes=check_hashes, progress=progress)
    from composeformer.gguf import open_gguf

    with open_gguf(where) as file:
        with telling(where):
            dialect = find(file.metadata)
            document = dialect.to_spec(file.metadata, shapes(file), file.get)
        model = skeleton(Spec.from_dict(document, label=str(where)))
        values = read(model.spec, dialect.name, file, where, model.placement.groups)
        fill(model, coded(model.spec, values), "cpu", progress)
    return model
