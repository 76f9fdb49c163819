"""Which layers differ, as config keys say it and back: a list, the first n, all beyond n, every nth, indices, all.

Writing tries the few values that could have meant these layers, and keeps one that reads back as them.
"""

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from composeformer.dialects.lines import UNSET, Pattern, Test
from composeformer.errors import DialectError, show

Layers = tuple[bool, ...]


def read(pattern: Pattern, config: Mapping[str, object], num_layers: int) -> Layers:
    """The chosen layers. Raises DialectError where a key makes no sense."""
    switch = True if pattern.switch is None else config.get(pattern.switch, pattern.switch_default)
    if not isinstance(switch, bool):
        raise DialectError(f"{pattern.switch} = {show(switch)}: must be true or false")
    for alternative in pattern.choose:
        stated = [_stated(test, config) for test in alternative]
        if any(value is UNSET for value in stated):
            continue
        layers = _together(alternative, stated, num_layers)
        if not switch and any(layers) and alternative[0].kind == "list":
            test = alternative[0]
            raise DialectError(
                f"{test.key} has {show(test.chosen)}, but {pattern.switch} is false: which is meant?"
            )
        return layers if switch else (False,) * num_layers
    keys = " or ".join(sorted({test.key for alternative in pattern.choose for test in alternative}))
    raise DialectError(f"{keys} is required")


def write(pattern: Pattern, layers: Layers) -> dict[str, Any]:
    """Keys that read back as these layers. Raises DialectError where there are none."""
    config: dict[str, Any] = {}
    if pattern.switch is not None:
        config[pattern.switch] = any(layers)
    # Where the switch says that none is chosen, nothing else has to.
    written = pattern.switch is not None and not any(layers)
    for alternative in pattern.choose:
        found = _express(alternative, layers)
        if found is not None:
            config.update(found)
            written = True
    if not written:
        numbers = [index for index, each in enumerate(layers) if each]
        raise DialectError(
            f"{pattern.ours}: layers {show(numbers)} of {len(layers)} fit no pattern of this family"
        )
    return config


def _express(alternative: tuple[Test, ...], layers: Layers) -> dict[str, Any] | None:
    """Values for the keys of all tests that together choose these layers."""
    for values in product(*(_candidates(test, layers) for test in alternative)):
        if _together(alternative, values, len(layers)) == layers:
            stated = zip(alternative, values, strict=True)
            return {test.key: value for test, value in stated if test.kind != "all"}
    return None


def _together(tests: tuple[Test, ...], values: Iterable[object], num_layers: int) -> Layers:
    """The layers that all tests choose."""
    sets = [chosen(test, value, num_layers) for test, value in zip(tests, values, strict=True)]
    return tuple(all(each) for each in zip(*sets, strict=True))


def _candidates(test: Test, layers: Layers) -> Iterable[Any]:
    num_layers = len(layers)
    numbers = [index for index, each in enumerate(layers) if each]
    match test.kind:
        case "list":
            return [[test.chosen if each else test.other for each in layers]]
        case "first":
            return [next((i for i, each in enumerate(layers) if not each), num_layers)]
        case "beyond":
            return [numbers[0] if numbers else num_layers]
        case "every":
            return range(1, num_layers + abs(test.offset) + 1)
        case "indices":
            return [numbers]
        case "all":
            return [True]
        case _:
            return [[], [index for index, each in enumerate(layers) if not each]]


def _stated(test: Test, config: Mapping[str, object]) -> object:
    if test.kind == "all":
        return True
    value = config.get(test.key, UNSET)
    return test.default if value is UNSET or value is None else value


def chosen(test: Test, value: object, num_layers: int) -> Layers:
    """The layers that a test chooses where its key has this value."""
    where = f"{test.key} = {show(value)}"
    if test.kind == "all":
        return (True,) * num_layers
    if test.kind == "list":
        if not isinstance(value, list) or len(value) != num_layers:
            raise DialectError(f"{where}: must be a list of {num_layers} layer types")
        for each in value:
            if each not in (test.chosen, test.other):
                raise DialectError(
                    f"{test.key} has {show(each)}: must be {show(test.chosen)} or {show(test.other)}"
                )
        return tuple(each == test.chosen for each in value)
    if test.kind in ("indices", "all_but"):
        if not isinstance(value, list) or not all(
            type(each) is int and 0 <= each < num_layers for each in value
        ):
            raise DialectError(f"{where}: must be a list of layer numbers below {num_layers}")
        inside = frozenset(value)
        return tuple((index in inside) == (test.kind == "indices") for index in range(num_layers))
    if type(value) is not int or value < (1 if test.kind == "every" else 0):
        raise DialectError(f"{where}: must be a count of layers")
    if test.kind == "first":
        return tuple(index < value for index in range(num_layers))
    if test.kind == "beyond":
        return tuple(index >= value for index in range(num_layers))
    return tuple((index + test.offset) % value == 0 for index in range(num_layers))
