"""What one device holds while a model is trained: weights, gradients, the optimizer's state, by its layout.

Weights are in the dtype that they are gathered in; where the optimizer updates them in a wider one, that copy is its
master. Replicas share what ZeRO (arXiv 1910.02054) says: the optimizer's state, gradients too, weights too. DualPipe
keeps two copies of the weights (arXiv 2412.19437, section 3.2.1).
"""

import attrs

from composeformer.costs.layout import Layout, layout
from composeformer.formats import BITS
from composeformer.spec import Spec


@attrs.frozen(kw_only=True)
class Memory:
    """Bytes of one device of a stage. `master` and `moments` are the optimizer's; moments are None where it does not
    say what it keeps. `gathered` is the largest part that is whole while it computes, where weights are shared.
    """

    stage: int
    parameters: float
    weights: float
    gathered: float
    gradients: float
    master: float
    moments: float | None
    buffers: float

    @property
    def total(self) -> float:
        return (
            self.weights + self.gathered + self.gradients + self.master + (self.moments or 0.0) + self.buffers
        )


def training(spec: Spec, placed: Layout | None = None) -> tuple[Memory, ...]:
    """The memory of a device of every stage, activations aside."""
    placed = layout(spec) if placed is None else placed
    optimizer = spec.singles.get("optimizer")
    states = getattr(optimizer.config, "states", None) if optimizer is not None else None
    return tuple(_stage(spec, placed, stage, states) for stage in range(placed.pipeline))


def largest(found: tuple[Memory, ...]) -> Memory:
    """Of the device that holds most; the first of several."""
    return max(found, key=lambda memory: memory.total)


def _stage(spec: Spec, placed: Layout, stage: int, states: int | None) -> Memory:
    formats, zero = spec.formats, placed.zero
    copies = 2 if spec.parallel.schedule == "dualpipe" and placed.pipeline > 1 else 1
    parameters = weights = gradients = master = moments = buffers = 0.0
    units: dict[str, float] = {}
    for held in placed.held(stage):
        form = formats.tensors[held.name]
        gathered = held.elements * _bytes(form.gather)
        if not held.weight.trains:
            buffers += held.elements * _bytes(held.weight.dtype or form.storage)
            continue
        if form.codec is not None:
            # Codes and their scales; they do not train.
            weights += held.elements * form.bits / 8
            continue
        parameters += held.elements
        weights += copies * gathered / (held.replicas if zero >= 3 else 1)
        gradients += held.elements * _bytes(form.gradient) / (held.replicas if zero >= 2 else 1)
        own = held.elements / (held.replicas if zero >= 1 else 1)
        master += own * _bytes(form.storage) if form.storage != form.gather else 0.0
        moments += own * _bytes(form.moment) * (states or 0)
        unit = ".".join(held.name.split(".")[:2])
        units[unit] = units.get(unit, 0.0) + gathered
    return Memory(
        stage=stage,
        parameters=parameters,
        weights=weights,
        gathered=max(units.values(), default=0.0) if zero >= 3 and placed.devices > 1 else 0.0,
        gradients=gradients,
        master=master,
        moments=None if states is None else moments,
        buffers=buffers,
    )


def _bytes(dtype: str) -> float:
    return BITS[dtype] / 8
