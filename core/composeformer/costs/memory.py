"""What one device holds while a model is trained, by its layout: weights, gradients, optimizer's state, activations.

Weights are in the dtype that they are gathered in; where the optimizer updates them in a wider one, that copy is its
master. Replicas share what ZeRO (arXiv 1910.02054) says: the optimizer's state, gradients too, weights too. DualPipe
keeps two copies of the weights, those of stages s and P - 1 - s on a device (arXiv 2412.19437, section 3.2.1).

A micro-batch's activations are kept from its forward to its backward pass. Stage s of P, from 0, has P - s of them in
flight under 1F1B, as many under zero-bubble schedules; under DualPipe a device is stage s of one direction and
P - 1 - s of the other, with P + 1 in all (table 2 there). No more are in flight than there are.
"""

from collections.abc import Iterator, Sequence

import attrs

from composeformer.contracts import Cache
from composeformer.costs.activations import Training, again, objective, per_token, unknown
from composeformer.costs.counts import DEFAULT_CONTEXT, activation_bytes, stated
from composeformer.costs.layout import Layout, layout
from composeformer.formats import BITS
from composeformer.plan import Node
from composeformer.spec import Spec


@attrs.frozen(kw_only=True)
class Memory:
    """Bytes of one device of a stage. `master` and `moments` are the optimizer's; moments are None where it does not
    say what it keeps. `gathered` is the largest part that is whole while it computes, where weights are shared.
    `activations` are those of `in_flight` micro-batches of `tokens` tokens, and of one layer that is made again; None,
    of every stage, where components do not say what they keep: those that are `silent`.
    """

    stage: int
    parameters: float
    weights: float
    gathered: float
    gradients: float
    master: float
    moments: float | None
    buffers: float
    activations: float | None
    tokens: int
    in_flight: int
    silent: tuple[str, ...]

    @property
    def total(self) -> float:
        state = self.weights + self.gathered + self.gradients + self.master + (self.moments or 0.0)
        return state + self.buffers + (self.activations or 0.0)


def training(spec: Spec, placed: Layout | None = None, *, context: int | None = None) -> tuple[Memory, ...]:
    """The memory of a device of every stage.

    Micro-batches are those of `[train]`, of one sequence at least; where it states none, one sequence of `context`
    tokens (4096, or the model's longest).
    """
    placed = layout(spec) if placed is None else placed
    optimizer = spec.singles.get("optimizer")
    states = getattr(optimizer.config, "states", None) if optimizer is not None else None
    batch = micro_batch(spec, placed, context)
    stages = [_kept(spec, placed, stage, batch) for stage in range(placed.pipeline)]
    return tuple(_stage(spec, placed, stage, states, batch, stages) for stage in range(placed.pipeline))


def largest(found: tuple[Memory, ...]) -> Memory:
    """Of the device that holds most; the first of several."""
    return max(found, key=lambda memory: memory.total)


def cached(spec: Spec, placed: Layout, stage: int, context: int) -> float:
    """Bytes of the caches of one sequence of `context` tokens on a device of a stage, a predictor's aside."""
    nodes = (node for top in placed.stages[stage] if top.slot != "predictor" for node in top.walk())
    found = 0.0
    for cache in (each for node in nodes for each in stated(node, "decode") if isinstance(each, Cache)):
        found += cache.elements(context) / (placed.tensor if cache.shard else 1)
    return found * activation_bytes(spec)


@attrs.frozen(kw_only=True)
class MicroBatch:
    """Sequences of `length` tokens that a device computes at once, and how many such there are in a step."""

    sequences: int
    length: int
    number: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def micro_batch(spec: Spec, placed: Layout, context: int | None = None) -> MicroBatch:
    """That of a device, as `[train]` says; without it one sequence, and as many as a pipeline can hold."""
    train = spec.document.data.get("train")
    longest = spec.model.max_position_embeddings
    if not (isinstance(train, dict) and "batch_size" in train):
        length = min(DEFAULT_CONTEXT, longest) if context is None else context
        return MicroBatch(sequences=1, length=length, number=2 * placed.pipeline)
    number = spec.train.micro_batches
    sequences = max(1, spec.train.batch_size // (placed.data * number))
    return MicroBatch(sequences=sequences, length=min(spec.train.sequence_length, longest), number=number)


@attrs.frozen(kw_only=True)
class Kept:
    """Activations of one micro-batch on a device of a stage: those that wait for its backward pass, and those that the
    backward pass makes again, of a layer at a time. In bytes.
    """

    waiting: float
    made_again: float
    silent: tuple[str, ...]


def _kept(spec: Spec, placed: Layout, stage: int, batch: MicroBatch) -> Kept:
    choice = spec.parallel.recompute
    whole = Training(context=batch.length, tensor=placed.tensor)
    chosen = attrs.evolve(whole, recompute=choice)
    stream = spec.model.hidden_size * _bytes(spec.formats.activations)
    waiting = made_again = 0.0
    silent: set[str] = set()
    for layer, nodes in _by_layer(placed.stages[stage]):
        silent.update(unknown(nodes))
        if choice == "full":
            kept = _of(nodes, whole) if layer is None else stream
        else:
            kept = _of(nodes, chosen)
        waiting += kept
        if choice != "none":
            made_again = max(made_again, _of(nodes, whole) - kept)
    return Kept(
        waiting=batch.tokens * waiting, made_again=batch.tokens * made_again, silent=tuple(sorted(silent))
    )


def _by_layer(tops: Sequence[Node]) -> Iterator[tuple[int | None, list[Node]]]:
    """The parts of each layer, and those of none with the loss that follows the head, by the layer's number."""
    layers: dict[int | None, list[Node]] = {}
    for top in tops:
        layers.setdefault(top.site.layer, []).extend(top.walk())
        if top.slot == "head":
            layers[None].append(objective(top.site.spec))
    yield from layers.items()


def _of(nodes: Sequence[Node], how: Training) -> float:
    """Bytes of a token that these parts keep, and what they run again."""
    return per_token(nodes, how) + sum(again(node, how) for node in nodes)


def _in_flight(spec: Spec, stage: int, stages: int, number: int) -> dict[int, int]:
    """How many micro-batches of which stages a device of this one has in flight at most."""
    if spec.parallel.schedule != "dualpipe" or stages == 1:
        return {stage: min(stages - stage, number)}
    other = stages - 1 - stage
    half = -(-number // 2)
    found = {stage: min(stages - stage, half)}
    found[other] = found.get(other, 0) + min(stage + 1, half)
    return found


def _stage(
    spec: Spec,
    placed: Layout,
    stage: int,
    states: int | None,
    batch: MicroBatch,
    stages: Sequence[Kept],
) -> Memory:
    flying = _in_flight(spec, stage, placed.pipeline, batch.number)
    activations = sum(count * stages[each].waiting for each, count in flying.items())
    activations += max(stages[each].made_again for each in flying)
    silent = {name for kept in stages for name in kept.silent}
    formats, zero = spec.formats, placed.zero
    parameters = gradients = master = moments = buffers = 0.0
    units: dict[str, float] = {}
    for held in placed.held(stage):
        form = formats.tensors[held.name]
        gathered = held.elements * _bytes(form.gather)
        if not held.weight.trains:
            buffers += held.elements * _bytes(held.weight.dtype or form.storage)
            continue
        if form.codec is not None:
            continue
        parameters += held.elements
        gradients += held.elements * _bytes(form.gradient) / (held.replicas if zero >= 2 else 1)
        own = held.elements / (held.replicas if zero >= 1 else 1)
        master += own * _bytes(form.storage) if form.storage != form.gather else 0.0
        moments += own * _bytes(form.moment) * (states or 0)
        unit = ".".join(held.name.split(".")[:2])
        units[unit] = units.get(unit, 0.0) + gathered
    return Memory(
        stage=stage,
        parameters=parameters,
        weights=_weights(spec, placed, stage),
        gathered=max(units.values(), default=0.0) if zero >= 3 and placed.devices > 1 else 0.0,
        gradients=gradients,
        master=master,
        moments=None if states is None else moments,
        buffers=buffers,
        activations=None if silent else activations,
        tokens=batch.tokens,
        in_flight=sum(flying.values()),
        silent=tuple(sorted(silent)),
    )


def _weights(spec: Spec, placed: Layout, stage: int) -> float:
    """Bytes of the weights on one device, as they are gathered, or as codes and scales that do not train: those of a
    stage, or of two, of which what they share is there once.
    """
    found: dict[str, float] = {}
    for held in (held for each in placed.device_stages(stage) for held in placed.held(each)):
        form = spec.formats.tensors[held.name]
        if held.weight.trains:
            bytes_ = _bytes(form.gather) if form.codec is None else form.bits / 8
            shared = held.replicas if placed.zero >= 3 and form.codec is None else 1
            found[held.name] = held.elements * bytes_ / shared
    return sum(found.values())


def _bytes(dtype: str) -> float:
    return BITS[dtype] / 8
