"""The spec of a folder whose codes are kept: the policy that its config names, and rules for what is stored otherwise.

The policy says which tensors it stores as codes; the folder says which are. Where they differ, and where a plain tensor
has another dtype than the policy's, a rule says so by role, so that every tensor is held in the dtype it is read in.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from composeformer.dialects import Dialect
from composeformer.dialects.coding import Stated
from composeformer.dialects.rules import cut
from composeformer.errors import DialectError
from composeformer.folder import WeightReader
from composeformer.precision import matches, starred
from composeformer.spec import Spec
from composeformer.store.decoding import Held, spelled

ADVICE = "decode the weights instead (weights = bfloat16 or float32)"
# In other dtypes there are no weights; reading refuses them by name.
PLAIN = ("float32", "bfloat16", "float16", "float64")


def kept(spec: Spec, dialect: Dialect, stated: Stated, held: Mapping[str, Held], reader: WeightReader) -> Spec:
    """The spec with a precision that stores each tensor as the folder does.

    Raises DialectError, a line for each tensor, where no precision does.
    """
    stored = _stored(spec, dialect, held, reader)
    problems = list(_unkept(stated, held, reader))
    precision: dict[str, Any] = dict(stated.precision)
    base = spec.with_({"precision": precision})
    differing: dict[str, dict[str, Any]] = defaultdict(dict)  # by format: roles
    roles = _roles(base)
    for name, found in stored.items():
        weight, form = base.plan.tensors[name], base.formats.tensors[name]
        if found == _as_stored(form.codec, form.storage) or weight.dtype is not None or name not in roles:
            continue
        differing[found][roles[name]] = None
    rules = []
    for found, named in sorted(differing.items()):
        coded = found == _as_stored(stated.coding.codec, stated.coding.codes)
        table = precision if coded else _plain(base, found)
        rules += [{"roles": role, "format": table} for role in _shortened(named, roles.values())]
    made = base.with_({"precision": {**precision, "rules": rules}}) if rules else base
    for name, found in stored.items():
        weight, form = made.plan.tensors[name], made.formats.tensors[name]
        if name in roles and weight.dtype is None and found != _as_stored(form.codec, form.storage):
            problems.append(f"{name}: is stored as {found}, in which no precision policy keeps it; {ADVICE}")
    if problems:
        raise DialectError(*cut(problems))
    return made


def _stored(spec: Spec, dialect: Dialect, held: Mapping[str, Held], reader: WeightReader) -> dict[str, str]:
    """How the folder stores each tensor of ours, as codes of a codec or in a dtype. A missing one is told elsewhere."""
    found: dict[str, str] = {}
    problems = []
    names = reader.names()
    for transfer in dialect.rules(spec):
        if transfer.kind != "move" or transfer.ours is None:
            continue
        here: dict[str, str] = {}
        for name in transfer.theirs.names:
            if name in names:
                dtype = spelled(names[name].dtype)
                codec = held[name].codec if name in held else None
                if codec is not None or dtype in PLAIN:
                    here.setdefault(_as_stored(codec, dtype), name)
        if len(here) > 1:
            told = " and ".join(f"{name} as {how}" for how, name in here.items())
            problems.append(f"{told}: are one tensor here, {transfer.ours.names[0]}, and can not be kept; {ADVICE}")
        elif here:
            found |= dict.fromkeys(transfer.ours.names, next(iter(here)))
    if problems:
        raise DialectError(*cut(problems))
    return found


def _unkept(stated: Stated, held: Mapping[str, Held], reader: WeightReader) -> Iterable[str]:
    """Tensors beside codes that can be read, but are not what the codec stores."""
    for each in held.values():
        for part in each.parts[1:]:
            dtype = spelled(reader.names()[part.name].dtype)
            if dtype != part.dtype:
                yield f"{part.name}: is stored as {dtype}, {stated.coding.codec} keeps it as {part.dtype}; {ADVICE}"


def _as_stored(codec: str | None, dtype: str) -> str:
    return dtype if codec is None else f"{dtype} codes of {codec}"


def _roles(spec: Spec) -> dict[str, str]:
    """What a rule calls each tensor: its map's role, or its own name. A map's bias goes with its weight."""
    linears = spec.plan.linears
    found = {}
    for name in spec.plan.tensors:
        role, _, last = name.rpartition(".")
        if role not in linears:
            found[name] = name
        elif last == "weight":
            found[name] = role
    return found


def _plain(spec: Spec, dtype: str) -> dict[str, Any]:
    """The default policy in a dtype."""
    default = spec.registry.default("precision")
    assert default is not None, "a spec without a default precision is none"
    return {"kind": default.kind, "dtype": dtype}


def _shortened(roles: Iterable[str], every: Iterable[str]) -> list[str]:
    """Patterns for roles that name no other: one for those that differ in numbers alone, where it can be."""
    wanted = dict.fromkeys(roles)
    patterns = dict.fromkeys(map(starred, wanted))
    others = [each for each in every if each not in wanted]
    fine = {each for each in patterns if not any(matches(each, other) for other in others)}
    return list(dict.fromkeys(starred(role) if starred(role) in fine else role for role in wanted))
