"""What a training forward keeps, counted: bytes that autograd holds when it ends, by the part that saved them first.

Tensors that exist anyway are left out: parameters, buffers, ids, rotary tables. The same model is run with one number
of rows and with twice that; the difference leaves out what all rows share, too: weights as they are multiplied, masks.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import composeformer as cf
from composeformer.decoder import Model
from composeformer.spec import Spec
from composeformer.tensors import ModelOutput, Rotary
from composeformer.train import Objective, TokenBatch, trainer


class Held:
    """A saved tensor, as long as the graph holds it."""

    def __init__(self, tensor: Tensor, path: str) -> None:
        self.tensor, self.path = tensor.detach(), path


class Watch:
    """What is saved while a model runs, and by which of its modules."""

    def __init__(self, model: Model) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.inside = ["objective"]
        self.held: list[weakref.ref[Held]] = []

    def save(self, tensor: Tensor) -> Held:
        held = Held(tensor, self.inside[-1])
        self.held.append(weakref.ref(held))
        return held

    def enter(self, module: nn.Module, *_: Any) -> None:
        self.inside.append(self.names[module])

    def leave(self, *_: Any) -> None:
        self.inside.pop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = register_module_forward_pre_hook(self.enter), register_module_forward_hook(self.leave)
        try:
            with saved_tensors_hooks(self.save, lambda held: held.tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def sizes(self, known: set[int]) -> dict[str, int]:
        """Bytes of each storage that is held once, by module; of those that are not `known`."""
        found: dict[str, int] = {}
        seen = set(known)
        for held in filter(None, (reference() for reference in self.held)):
            storage = held.tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[held.path] = found.get(held.path, 0) + storage.nbytes()
        return found


def counted(spec: Spec, rows: int, tokens: int) -> dict[str, float]:
    """Bytes of each token that a module keeps, by its name; `objective` for the loss."""
    model = cf.build(spec, seed=0)
    objective, _ = trainer(model)
    one, two = (_kept(model, objective, each, tokens) for each in (rows, 2 * rows))
    return {name: (size - one.get(name, 0)) / (rows * tokens) for name, size in two.items()}


def _kept(model: Model, objective: Objective, rows: int, tokens: int) -> dict[str, int]:
    generator = torch.Generator().manual_seed(rows)
    batch = TokenBatch(torch.randint(model.spec.model.vocab_size, (rows, tokens), generator=generator))
    tables: list[Tensor] = []
    make = model.rotary

    def rotary(positions: Tensor) -> dict[str, Rotary]:
        made = make(positions)
        tables.extend(table for pair in made.values() for table in pair)
        return made

    watch = Watch(model)
    vars(model)["rotary"] = rotary
    with watch.watching():
        output = model(batch.ids, phase="train", predict=model.predictor is not None)
        losses = [objective(output, batch.seen())[0]]
        losses += [objective(ModelOutput(each.logits, each.hidden), each.batch)[0] for each in output.predictions]
        losses += output.aux.losses.values()
    del vars(model)["rotary"]
    anyway = [*model.parameters(), *model.buffers(), batch.ids, *tables]
    found = watch.sizes({tensor.untyped_storage().data_ptr() for tensor in anyway})
    assert losses  # they hold the graph until here
    return found
