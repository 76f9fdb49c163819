"""Laws of residuals: they join sublayers, each called once, and mix no tokens themselves.

What they make of the stream, parts claim: `identity`, that sublayers of zeros leave it; `adds`, that it gains their
outputs; `in-order`, that one reads what the one before it left; `normalises-first`, what exactly each one reads.

Shapes: B rows, T tokens, D hidden size. A stream is (B, T, ...): what `open` makes of (B, T, D).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from composeformer.assemble import in_dtype
from composeformer.contracts import SUBLAYERS
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.tensors import NO_AUX, Aux, Batch, Output
from composeformer.testing.bounds import size
from composeformer.testing.case import Case
from composeformer.testing.law import law

Sublayers = Mapping[str, Callable[[Tensor], Output]]


def batch_of(model: Model, x: Tensor) -> Batch:
    """A batch of as many tokens."""
    return model.batch(torch.zeros(x.shape[:2], dtype=torch.int64))


def joined(case: Case, model: Model, x: Tensor, sublayers: Sublayers) -> Tensor:
    """Hidden states (B, T, D) through one layer's residual around the sublayers given."""
    output: Output = case.part_of(model)(model.residual.open(x), batch_of(model, x), sublayers)
    return output.hidden


def through(case: Case, model: Model, x: Tensor) -> Tensor:
    """Hidden states (B, T, D) through a layer of sublayers that look at each token alone, and out of the stream."""
    hidden: Tensor = model.residual.close(joined(case, model, x, alone(case)))
    return hidden


def alone(case: Case) -> Sublayers:
    """Sublayers that compute something of each token, in its dtype."""

    def sublayer(number: int) -> Callable[[Tensor], Output]:
        return lambda y: Output((number + 1) * y + y.roll(1, -1) * y)

    return {name: sublayer(number) for number, name in enumerate(case.node.site.sublayers)}


def zeros(case: Case) -> Sublayers:
    """Sublayers that give zeros."""
    return {name: lambda y: Output(torch.zeros_like(y)) for name in case.node.site.sublayers}


def giving(hidden: Tensor, aux: Aux = NO_AUX) -> Callable[[Tensor], Output]:
    """A sublayer that gives the same, whatever it reads."""
    return lambda y: Output(hidden, aux)


def drawn(case: Case) -> Tensor:
    """A few hidden states (B, T, D)."""
    return case.stream("x", case.integer("rows", 1, 3), case.integer("tokens", 1, 5))


@law(
    "residual",
    "calls-each-once",
    "it calls each sublayer that its layer has once, on (B, T, D), and what each gives reaches the stream",
    kills="residual-forgets-a-sublayer",
    examples=10,
)
def calls_each_once(case: Case) -> None:
    lacking = case.choice("lacking", (None, *SUBLAYERS))
    model = case.model
    if lacking is not None:
        layers = [{**layer, lacking: False} for layer in case.data["layers"]]
        try:
            spec = case.spec_of({**case.data, "layers": layers})
        except SpecError as error:
            case.draw.reject(str(error.problems[0]))
        model = case.built(in_dtype(spec, case.spec.formats.activations))
    names = [name for name in SUBLAYERS if name != lacking]
    x = drawn(case)
    called: list[str] = []
    given = {name: case.stream(name, *x.shape[:2]).requires_grad_() for name in names}

    def sublayer(name: str) -> Callable[[Tensor], Output]:
        def run(y: Tensor) -> Output:
            called.append(name)
            case.equal(y.shape, x.shape, f"the shape of what {name} reads")
            case.equal(y.dtype, x.dtype, f"the dtype of what {name} reads")
            return Output(given[name])

        return run

    stream = model.residual.open(x)
    output = case.part_of(model)(stream, batch_of(model, x), {name: sublayer(name) for name in names})
    case.equal(sorted(called), sorted(names), "the sublayers called")
    case.equal(output.hidden.shape, stream.shape, "the shape of the stream")
    case.equal(output.hidden.dtype, stream.dtype, "the dtype of the stream")
    closed = model.residual.close(output.hidden)
    case.equal((closed.shape, closed.dtype), (x.shape, x.dtype), "shape and dtype of what leaves the stream")
    cotangent = torch.linspace(-1, 1, closed.numel()).view(closed.shape).to(closed.dtype)
    gradients = torch.autograd.grad(closed, list(given.values()), cotangent, allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        reached = gradient is not None and bool(gradient.abs().amax(-1).gt(0).all())
        case.require(reached, f"what {name} gives reaches no stream")


@law(
    "residual",
    "each-token-alone",
    "a token's stream is made of its own alone, in a layer and at both ends, whatever the others hold",
    kills="residual-weighs-by-the-rest",
    examples=8,
)
def each_token_alone(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 3), case.integer("tokens", 2, 5)
    row, one = case.integer("row", 0, rows - 1), case.integer("one", 0, tokens - 1)
    x = case.stream("x", rows, tokens)
    case.settle(lambda model, y: through(case, model, y), x)
    spoilt = torch.full_like(x, torch.nan)
    spoilt[row, one] = x[row, one]
    with torch.no_grad():
        whole = through(case, case.model, x)
        found = through(case, case.model, spoilt)[row, one]
        itself = through(case, case.model, x[row : row + 1, one : one + 1])[0, 0]
    case.equal(found, whole[row, one], "a token beside others that are NaN")
    case.close(itself, whole[row, one], "a token by itself", scale=size(whole))


@law(
    "residual",
    "keeps-its-dtype",
    "sublayers in a wider dtype do not widen the stream",
    kills="residual-widens-the-stream",
    examples=8,
)
def keeps_its_dtype(case: Case) -> None:
    x = drawn(case)
    wide = {name: lambda y: Output(y.double()) for name in case.node.site.sublayers}
    case.equal(
        joined(case, case.model, x, wide).dtype, case.model.residual.open(x).dtype, "the stream's dtype"
    )


@law(
    "residual",
    "side-results",
    "the side results of all sublayers come out as they were given",
    kills="residual-keeps-the-last-side-results",
    examples=5,
)
def side_results(case: Case) -> None:
    x = drawn(case)
    given = {
        name: Aux(
            losses={f"{name}.loss": torch.tensor(float(number), requires_grad=True)},
            counts={f"{name}.count": torch.arange(number, number + 3)},
            metrics={f"{name}.metric": (torch.tensor(2.0 * number), torch.tensor(number))},
        )
        for number, name in enumerate(case.node.site.sublayers, 1)
    }
    stream = case.model.residual.open(x)
    sublayers = {name: giving(torch.ones_like(x), aux) for name, aux in given.items()}
    found: Output = case.part(stream, batch_of(case.model, x), sublayers)
    for name, aux in given.items():
        for field in Aux._fields:
            made: Mapping[str, Any] = getattr(found.aux, field)
            for path, value in getattr(aux, field).items():
                case.require(path in made, f"the {field} of {name} do not come out")
                pairs = zip(made[path], value) if field == "metrics" else [(made[path], value)]
                same = all(torch.equal(one, other) for one, other in pairs)
                case.require(same, f"the {field} of {name} come out changed")
    if not any(case.part(stream, batch_of(case.model, x), zeros(case)).aux):
        for field in Aux._fields:
            wanted = {path for aux in given.values() for path in getattr(aux, field)}
            case.equal({*getattr(found.aux, field)}, wanted, f"the paths of {field}")


@law(
    "residual",
    "identity",
    "sublayers that give zeros leave the stream as it is, and its gradient",
    kills="residual-adds-the-normalised",
    claimed=True,
    examples=8,
)
def identity(case: Case) -> None:
    x = drawn(case)
    with torch.no_grad():
        case.equal(joined(case, case.model, x, zeros(case)), case.model.residual.open(x), "the stream")
    cotangent = case.normal("cotangent", *x.shape)
    found = case.gradients(case.model, lambda y: joined(case, case.model, y, zeros(case)), x, cotangent)
    case.equal(found["input"], cotangent, "the stream's gradient")


@law(
    "residual",
    "adds",
    "the stream gains what the sublayers give, each once",
    kills="residual-adds-one-twice",
    claimed=True,
    examples=6,
)
def adds(case: Case) -> None:
    x = drawn(case)
    given = {name: case.stream(name, *x.shape[:2]) for name in case.node.site.sublayers}
    with torch.no_grad():
        found = joined(case, case.model, x, {name: giving(z) for name, z in given.items()})
    wanted = sum(given.values(), x.double())
    case.close(found, wanted, "the stream", scale=size({"x": x, **given}) * (1 + len(given)))


@law(
    "residual",
    "in-order",
    "a sublayer reads the stream that those before it left",
    kills="residual-in-parallel",
    claimed=True,
    examples=6,
)
def in_order(case: Case) -> None:
    x = drawn(case)
    first, *rest = case.node.site.sublayers
    added = case.stream("added", *x.shape[:2])

    def reads(model: Model, y: Tensor, gives: Tensor | float) -> Tensor:
        """What the second sublayer reads after the first gave something."""
        heard: list[Tensor] = []

        def hear(z: Tensor) -> Output:
            heard.append(z)
            return Output(torch.zeros_like(z))

        joined(
            case,
            model,
            y,
            {first: lambda z: Output(torch.zeros_like(z) + gives), **dict.fromkeys(rest, hear)},
        )
        return heard[0]

    case.settle(lambda model, y: reads(model, y, 0.0), x + added)
    with torch.no_grad():
        found, wanted = reads(case.model, x, added), reads(case.model, x + added, 0.0)
    case.close(found, wanted, f"what {rest[0]} reads after {first}")


@law(
    "residual",
    "normalises-first",
    "a sublayer reads the stream through the norm of its name, the head through the last one; the stream has none",
    kills="residual-swaps-its-norms",
    claimed=True,
    examples=8,
)
def normalises_first(case: Case) -> None:
    x = drawn(case)
    names = case.node.site.sublayers
    for name in names:
        heard: list[Tensor] = []

        def hear(y: Tensor, heard: list[Tensor] = heard) -> Output:
            heard.append(y)
            return Output(torch.zeros_like(y))

        with torch.no_grad():
            joined(case, case.model, x, {**zeros(case), name: hear})
            norm: Any = case.part.get_submodule(f"{name}_norm")
            case.equal(heard[0], norm(x), f"what {name} reads")
    last: Any = case.model.residual
    with torch.no_grad():
        case.equal(last.open(x), x, "the stream that the embeddings start")
        case.equal(last.close(x), last.get_submodule("norm")(x), "what leaves the stream")
