"""What was built is what was declared: the check that ends every build."""

from torch import nn

from composeformer.decoder import Model
from composeformer.errors import PluginError, one_of
from composeformer.precision import Formats


def agree(model: Model, formats: Formats) -> None:
    """Raises PluginError unless what was built is what was declared: names, shapes of this process's part,
    parameters, aliases.
    """
    built = model.state_dict(keep_vars=True)
    aliases = formats.aliases
    declared = {**formats.stored, **{name: formats.stored[target] for name, target in aliases.items()}}
    _same("is built but not declared", built.keys() - declared.keys())
    _same("is declared but not built", declared.keys() - built.keys())
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    _same("is a buffer that is not saved", buffers - built.keys())
    for name, weight in declared.items():
        found, shape = built[name], model.placement.here(aliases.get(name, name), weight).shape
        if tuple(found.shape) != shape:
            raise PluginError(f"{name}: built with shape {tuple(found.shape)}, declared with {shape}")
        if name not in aliases and isinstance(found, nn.Parameter) != weight.trains:
            told = f"declared with trains = {weight.trains}"
            raise PluginError(f"{name}: built as {type(found).__name__}, {told}")
        if name in aliases and found is not built[aliases[name]]:
            raise PluginError(f"{name}: built as a tensor of its own, declared the same as {aliases[name]}")


def _same(what: str, names: set[str]) -> None:
    if names:
        raise PluginError(f"{one_of(sorted(names))}: {what}")
