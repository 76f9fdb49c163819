"""The codings of all plugins, and what they mean for a model: its config's table, and the tensors beside its codes."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import attrs

from composeformer.dialects.coding import TABLE, Coding, Stated, codec, is_coding, parse
from composeformer.dialects.rules import Shape, Side, Transfer
from composeformer.errors import DialectError, nearest, one_of, show
from composeformer.plugins import Plugins, current

if TYPE_CHECKING:
    from composeformer.precision import Formats
    from composeformer.spec import Spec

log = logging.getLogger(__name__)


def load_all() -> tuple[Coding, ...]:
    """The codings of all plugins. One that can not be read is reported and left out."""
    return _loaded(current())


@cache
def _loaded(plugins: Plugins) -> tuple[Coding, ...]:
    found = []
    for file in plugins.dialect_files:
        try:
            text = file.read_text(encoding="utf-8")
            if is_coding(text):
                found.append(parse(text, file.name))
        except (DialectError, OSError, UnicodeDecodeError) as error:
            log.warning("dialect %s is left out: %s", file.name, error)
    return tuple(found)


def find(table: object) -> Stated:
    """What a config's `quantization_config` means. Raises DialectError where no coding reads it."""
    codings = load_all()
    methods = list(dict.fromkeys(each.quant_method for each in codings))
    stated = table.get("quant_method") if isinstance(table, Mapping) else None
    asked = [each for each in codings if each.quant_method == stated]
    if not isinstance(table, Mapping) or not asked:
        near = nearest(stated, methods) if isinstance(stated, str) else None
        hint = f"; did you mean {near!r}?" if near else ""
        told = f"quant_method must be {one_of(methods)}" if methods else "no plugin brings a coding"
        raise DialectError(f"{TABLE} = {show(table)}: these weights can not be read; {told}{hint}")
    refusals: list[Sequence[str]] = []
    for each in asked:
        try:
            return each.read(table)
        except DialectError as error:
            refusals.append(error.lines)
    raise DialectError(*min(refusals, key=len))


def of_codec(kind: str) -> Coding:
    """The coding that stores as a codec does. Raises DialectError where there is none."""
    found = next((each for each in load_all() if each.codec == kind), None)
    if found is None:
        raise DialectError(f"weights are stored by the codec {kind}, for which no dialect has names")
    return found


def extended(transfers: Sequence[Transfer], spec: "Spec") -> list[Transfer]:
    """Transfers of a model with those of what stands beside its codes.

    Raises DialectError where codes can not be moved.
    """
    coded = spec.formats.coded
    if not coded:
        return list(transfers)
    moved: dict[int, list[Transfer]] = {}
    codings: dict[str, Coding] = {}  # of their coded tensors
    for place, each in enumerate(transfers):
        if each.kind == "move" and each.ours is not None and any(name in coded for name in each.ours.names):
            coding, moved[place] = _coded(each, spec.formats)
            codings |= dict.fromkeys(each.theirs.names, coding)
    made: list[Transfer] = []
    for place, each in enumerate(transfers):
        if each.same_as in codings:
            made += _copies(each, codings[each.same_as])
        else:
            made += moved.get(place, [each])
    return made


def _coded(each: Transfer, formats: "Formats") -> tuple[Coding, list[Transfer]]:
    """Codes and companions move alike; what reorders or joins elements would tear blocks apart."""
    assert each.ours is not None
    ours, theirs = each.ours, each.theirs
    label = theirs.names[0]
    kinds = {formats.tensors[name].codec for name in ours.names}
    if len(kinds) > 1:
        raise DialectError(f"{label}: is stored as codes in part: {one_of(ours.names)}")
    if each.reorders or len(ours.parts) * len(theirs.parts) > 1 or ours.joined() != theirs.joined():
        told = "its elements are reordered or joined, which tears blocks of codes apart; dequantise them"
        raise DialectError(f"{label}: {told}")
    coding = of_codec(str(kinds.pop()))
    held = coding.stored(label, next(iter(theirs.tensor_shapes().values())))
    mine = [formats.stored[name] for name in formats.coded[ours.names[0]]]
    # Tens of thousands of names: what is the same for all of them is asked once.
    named = [theirs.parts[0], *(tuple(map(each.name, theirs.parts[0])) for each in coding.companions)]
    made = [
        Transfer(
            kind="move",
            theirs=_side(theirs, named[i], held[i].shape),
            ours=_side(ours, tuple(formats.coded[name][i] for name in ours.names), part.shape),
            dtype=part.dtype,
        )
        for i, part in enumerate(mine)
    ]
    return coding, made


def _side(side: Side, names: tuple[str, ...], shape: Shape) -> Side:
    """The side of other tensors of one shape, stacked as its own are."""
    return attrs.evolve(side, parts=(names,), shapes=((len(names), *shape) if side.stacked else shape,))


def _copies(each: Transfer, coding: Coding) -> list[Transfer]:
    """The same for each tensor beside the codes."""
    made = [each]
    for companion in coding.companions:
        parts = tuple(tuple(map(companion.name, part)) for part in each.theirs.parts)
        theirs = attrs.evolve(each.theirs, parts=parts)
        made.append(attrs.evolve(each, theirs=theirs, same_as=companion.name(str(each.same_as))))
    return made


def config(spec: "Spec", transfers: Callable[[], Iterable[Transfer]]) -> dict[str, Any]:
    """The `quantization_config` of a model, in a table; empty where no weight is stored as codes.

    It lists the modules that a reader would take for codes: maps that are not sensitive, and are stored plainly.
    Raises DialectError where no table can say it, and where codes can not be moved.
    """
    formats = spec.formats
    if not formats.coded:
        return {}
    first = next(iter(formats.coded))
    coding, *others = map(of_codec, dict.fromkeys(str(formats.tensors[name].codec) for name in formats.coded))
    if others:
        kinds = [each.codec for each in (coding, *others)]
        raise DialectError(f"weights are stored by the codecs {one_of(kinds)}, and {TABLE} names one")
    moved = list(transfers())
    extended(moved, spec)
    linears = {f"{role}.weight" for role, linear in spec.plan.linears.items() if not linear.sensitive}
    plain = linears - formats.coded.keys()
    modules: dict[str, None] = {}
    for each in moved if plain else ():
        if each.ours is not None and not plain.isdisjoint(each.ours.names):
            modules |= dict.fromkeys(name.removesuffix(".weight") for name in each.theirs.names)
    policy = formats.decides(first.rpartition(".")[0]).config
    return {TABLE: coding.write(policy, list(modules))}


__all__ = [
    "TABLE",
    "Coding",
    "Stated",
    "codec",
    "config",
    "extended",
    "find",
    "is_coding",
    "load_all",
    "of_codec",
    "parse",
]
