"""`compose.lock`: under which conventions a folder's weights were written.

It records the fingerprint, the dialect of the tensor names, and for every component its kind, revision,
plugin, version and the values that the fingerprint leaves out. Reading compares kinds and revisions with
what is installed: a revision is another function, a version is not.
"""

from pathlib import Path
from typing import Any

import tomli
import tomli_w

from composeformer import __version__
from composeformer.config import facts_of, plain
from composeformer.contracts import Component, LayerParts, Part
from composeformer.errors import ComposeError, FolderError
from composeformer.plugins import current
from composeformer.spec import Spec

NAME = "compose.lock"
FORMAT = 1
NATIVE = "native"
MAX_BYTES = 16_000_000


def lock_text(spec: Spec, dialect: str) -> str:
    """The lock of a model as TOML."""
    registry = current().registry
    components: dict[tuple[str, str], dict[str, Any]] = {}

    def entry(component: Component) -> dict[str, Any]:
        owner = registry.owner(component)
        made: dict[str, Any] = {
            "slot": component.slot,
            "kind": component.kind,
            "revision": component.revision,
            "plugin": owner.name,
            "distribution": owner.distribution,
            "version": owner.version or "unknown",
            "values": [],
        }
        return components.setdefault((component.slot, component.kind), made)

    formats = spec.formats
    parts = [node.part for node in spec.plan.nodes()] + [p for p in spec.singles.values() if p is not None]
    for part in [*parts, *(rule.format for rule in formats.rules)]:
        values = _execution(part)
        held = entry(part.component)["values"]
        if values and values not in held:
            held.append(values)
    # What codes mean is a convention too.
    for kind in dict.fromkeys(str(formats.tensors[name].codec) for name in formats.coded):
        entry(registry.get("codec", kind))
    document = {
        "format": FORMAT,
        "composeformer": __version__,
        "fingerprint": spec.fingerprint,
        "dialect": dialect,
        "components": [components[key] for key in sorted(components)],
    }
    return tomli_w.dumps(document)


def _execution(part: Part) -> dict[str, Any]:
    """Values that do not enter the fingerprint, defaults included: another version may have others."""
    values = {}
    for name, facts in facts_of(type(part.config)).items():
        value = getattr(part.config, name)
        if facts.affects != "function" and value is not None and not isinstance(value, Part | LayerParts):
            values[name] = plain(value)
    return values


def read_lock(folder: Path) -> dict[str, Any]:
    """The lock of a folder, its shape checked. Raises FolderError."""
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FolderError(f"{path}: larger than {MAX_BYTES} bytes")
        document = tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(
            f"{path}: missing; a model folder of composeformer has one beside spec.toml"
        ) from None
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError, RecursionError) as error:
        raise FolderError(f"{path}: can not be read: {error}") from None
    if document.get("format") != FORMAT:
        raise FolderError(f"{path}: format = {document.get('format')}: this version reads {FORMAT}")
    components = document.get("components")
    if not isinstance(document.get("fingerprint"), str) or not isinstance(document.get("dialect"), str):
        raise FolderError(f"{path}: fingerprint and dialect must be strings")
    if not isinstance(components, list) or not all(isinstance(c, dict) for c in components):
        raise FolderError(f"{path}: components must be an array of tables")
    return document


def check_lock(folder: Path, spec: Spec, lock: dict[str, Any]) -> None:
    """Raises FolderError, a line for each, where the installed parts are not those that wrote the weights."""
    wrong = []
    registry = current().registry
    for entry in lock["components"]:
        slot, kind, revision = entry.get("slot"), entry.get("kind"), entry.get("revision")
        by = f"{entry.get('distribution')} {entry.get('version')}"
        try:
            installed = registry.get(str(slot), str(kind))
        except ComposeError:
            wrong.append(f"{folder / NAME}: {slot} {kind} of {by} is not installed")
            continue
        if installed.revision != revision:
            wrong.append(
                f"{folder / NAME}: {slot} {kind} had revision {revision} in {by}, installed is revision "
                f"{installed.revision}: it computes another function"
            )
    if not wrong and lock["fingerprint"] != spec.fingerprint:
        wrong.append(
            f"{folder / NAME}: fingerprint {lock['fingerprint'][:12]} is not spec.toml's ({spec.fingerprint[:12]}): "
            "the spec was changed after the weights were written"
        )
    if wrong:
        raise FolderError(*wrong)
