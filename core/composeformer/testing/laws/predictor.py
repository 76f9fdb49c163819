"""Laws of predictors: what they may see, which token each depth is to say, and that they leave the model as it is.

Depth k predicts token t + k + 1 where tokens t to t + k are real and of one document. Laws that compare forwards of
other shapes are tried in float64 where the part can be: in a narrower dtype rounding alone chooses other experts.

Shapes: B rows, T tokens, S of them that a depth predicts from, D hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from composeformer.assemble import build, in_dtype
from composeformer.contracts import SUBLAYERS, Uses
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.tensors import ModelOutput, Output, Prediction
from composeformer.testing.bounds import size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.train import trainer

LONGEST = 9


def widened(case: Case) -> None:
    """Puts the case into float64, where the implementation serves that."""
    wide = in_dtype(case.spec, "float64")
    try:
        build(wide, device="meta")
    except SpecError:
        return
    case.spec = wide


def predicted(model: Model, ids: Tensor, **batch: Any) -> ModelOutput:
    """A forward with its predictions."""
    output: ModelOutput = model(ids, predict=True, **batch)
    return output


def said(predictions: Sequence[Prediction]) -> Tensor:
    """All logits (N, V) of all depths."""
    return torch.cat([each.logits.flatten(0, 1) for each in predictions])


def settled(case: Case, rows: int, shortest: int = 4, longest: int = LONGEST) -> Tensor:
    """Token ids (B, T) at which the condition of the predictions is known."""
    widened(case)
    ids = case.ids("ids", rows, case.integer("tokens", shortest, longest))
    case.settle(lambda model, at: said(predicted(model, at).predictions), ids)
    return ids


@law(
    "predictor",
    "leaves-the-model",
    "logits, hidden states and side results of the model are the same bits with its predictions and without",
    kills="predictor-normalises-in-place",
    examples=10,
)
def leaves_the_model(case: Case) -> None:
    ids = case.ids("ids", case.integer("rows", 1, 3), case.integer("tokens", 1, LONGEST))
    model = case.model.train(case.boolean("training"))
    with torch.no_grad():
        found, wanted = predicted(model, ids), model(ids, predict=False)
    case.equal(found.logits, wanted.logits, "the model's logits")
    case.equal(found.hidden, wanted.hidden, "its hidden states")
    case.equal(len(wanted.predictions), 0, "predictions that nobody asked for")
    for field in found.aux._fields:
        told: Mapping[str, Any] = getattr(found.aux, field)
        without: Mapping[str, Any] = getattr(wanted.aux, field)
        own = {path for path in told if not path.startswith("predictor")}
        case.equal(own, set(without), f"the paths of the model's {field}")
        for path, value in without.items():
            pairs = zip(told[path], value, strict=True) if isinstance(value, tuple) else [(told[path], value)]
            for one, other in pairs:
                case.equal(one, other, f"{field}: {path}")


@law(
    "predictor",
    "labels",
    "the label of depth k at t is token t + k + 1, or none where padding or another document is between",
    kills="predictor-labels-across-documents",
    examples=25,
)
def labels(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 3), case.integer("tokens", 1, LONGEST)
    ids = case.ids("ids", rows, tokens)
    valid, documents = None, None
    if case.boolean("padded"):
        valid = mask(case, "valid", rows, tokens)
    if case.boolean("packed"):
        documents = mask(case, "starts", rows, tokens, one_in=3).cumsum(1)
    check_labels(case, ids, valid, documents)
    # One hole, which the tokens on either side are not to be joined across.
    ids = case.ids("other ids", 1, LONGEST)
    valid = torch.arange(LONGEST)[None] != case.integer("hole", 1, LONGEST - 2)
    check_labels(case, ids, valid, None)


def check_labels(case: Case, ids: Tensor, valid: Tensor | None, documents: Tensor | None) -> None:
    """Which labels each depth has, and that it learns at no other place."""
    with torch.no_grad():
        predictions = predicted(case.model, ids, valid=valid, documents=documents).predictions
    objective, _ = trainer(case.model)
    for k, each in enumerate(predictions, 1):
        wanted = following(ids, valid, documents, k)
        case.equal(of_batch(each), wanted, f"the labels of depth {k}, by row and token")
        logits = each.logits.detach().requires_grad_()
        total, weight = objective(ModelOutput(logits, each.hidden), each.batch)
        case.equal(weight, objective.weight(each.batch), f"the weight of depth {k}")
        (gradient,) = torch.autograd.grad(total, logits)
        learns = {(int(row), int(t)) for row, t in gradient.abs().amax(-1).nonzero()}
        case.require(
            learns <= set(wanted), f"depth {k} learns at {sorted(learns - set(wanted))}, without a label"
        )
    for k in range(len(predictions) + 1, depths(case) + 1):
        missing = sorted(following(ids, valid, documents, k))
        case.require(not missing, f"depth {k} predicts nothing, and has labels at {missing}")


def depths(case: Case) -> int:
    """How many depths the predictor has: what it predicts for a row with room for all."""
    longest = case.spec.model.max_position_embeddings
    with torch.no_grad():
        return len(predicted(case.model, torch.zeros(1, min(32, longest), dtype=torch.int64)).predictions)


def mask(case: Case, label: str, rows: int, tokens: int, one_in: int = 0) -> Tensor:
    """Booleans (B, T): most are true, or one in so many."""
    drawn = torch.tensor(case.integers(label, 0, 5, rows * tokens, rows * tokens)).view(rows, tokens)
    return drawn % one_in == 0 if one_in else drawn > 0


def following(
    ids: Tensor, valid: Tensor | None, documents: Tensor | None, k: int
) -> dict[tuple[int, int], int]:
    """The label at depth k of every row and token that has one."""
    found = {}
    for row, tokens in enumerate(ids.tolist()):
        for t in range(len(tokens) - k - 1):
            span = slice(t, t + k + 2)
            real = valid is None or bool(valid[row, span].all())
            one = documents is None or len(set(documents[row, span].tolist())) == 1
            if real and one:
                found[row, t] = tokens[t + k + 1]
    return found


def of_batch(prediction: Prediction) -> dict[tuple[int, int], int]:
    """The labels that an objective finds in a prediction's batch: the next token, if both are real, of one document."""
    batch = prediction.batch
    ids, valid, documents = batch.ids, batch.valid, batch.documents
    return {(row, t): label for (row, t), label in following(ids, valid, documents, 0).items()}


@law(
    "predictor",
    "sees-no-label",
    "depth k at token t knows no token after t + k",
    kills="predictor-embeds-its-label",
    examples=10,
)
def sees_no_label(case: Case) -> None:
    ids = settled(case, case.integer("rows", 1, 2))
    changed = case.integer("changed", 1, ids.shape[1] - 1)
    other = ids.clone()
    other[:, changed:] = case.ids("others", ids.shape[0], ids.shape[1] - changed)
    with torch.no_grad():
        before, after = (predicted(case.model, each).predictions for each in (ids, other))
    for k, (one, two) in enumerate(zip(before, after, strict=True), 1):
        until = max(0, changed - k)
        told = f"depth {k}, up to {k} tokens before the first one that changed"
        case.close(
            two.logits[:, :until], one.logits[:, :until], told, scale=size(one.logits), terms=ids.shape[1]
        )


@law(
    "predictor",
    "documents",
    "packed documents are predicted, and counted, as each alone",
    kills="predictor-forgets-the-documents",
    examples=10,
)
def documents(case: Case) -> None:
    ids = settled(case, case.integer("rows", 1, 2), 5)
    first = case.integer("first", 1, ids.shape[1] - 1)
    numbers = (torch.arange(ids.shape[1]) >= first).long().expand_as(ids)
    with torch.no_grad():
        packed = predicted(case.model, ids, documents=numbers)
        alone = [predicted(case.model, part) for part in (ids[:, :first], ids[:, first:])]
    for start, part in zip((0, first), alone, strict=True):
        for k, each in enumerate(part.predictions):
            whole = packed.predictions[k].logits
            length = each.logits.shape[1]
            told = f"depth {k + 1} of the document from {start}"
            case.close(
                whole[:, start : start + length], each.logits, told, scale=size(whole), terms=ids.shape[1]
            )
    same_counts(case, packed, alone)


def same_counts(case: Case, whole: ModelOutput, parts: Sequence[ModelOutput]) -> None:
    """The predictor's counts of a batch are the sums of its parts'."""
    for path, count in whole.aux.counts.items():
        if path.startswith("predictor"):
            counted = [part.aux.counts[path] for part in parts if path in part.aux.counts]
            case.equal(count, sum(counted, torch.zeros_like(count)), f"counts: {path}")


@law(
    "predictor",
    "padding",
    "rows of other lengths, padded on either side with anything, are predicted and counted as each alone",
    kills="predictor-counts-its-padding",
    examples=10,
)
def padding(case: Case) -> None:
    ids = settled(case, 2)
    tokens, pads = ids.shape[1], case.integer("pads", 1, 3)
    left = case.integer("left", 0, pads)
    padded = case.ids("rest", 2, tokens + pads)
    valid = torch.ones_like(padded, dtype=torch.bool)
    starts, lengths = (left, pads), (tokens, tokens)
    for row, start in enumerate(starts):
        padded[row, start : start + tokens] = ids[row]
        valid[row, :start], valid[row, start + tokens :] = False, False
    with torch.no_grad():
        together = predicted(case.model, padded, valid=valid)
        alone = [predicted(case.model, ids[row : row + 1]) for row in range(2)]
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for k, each in enumerate(alone[row].predictions, 1):
            whole = together.predictions[k - 1].logits
            found = whole[row, start : start + length - k]
            case.close(
                found, each.logits[0], f"depth {k} of row {row}", scale=size(each.logits), terms=tokens
            )
    same_counts(case, together, alone)


@law(
    "predictor",
    "shares",
    "the depths' shares of the loss weight are no less than 0 and add up to 1",
    kills="predictor-sums-its-depths",
    examples=4,
)
def shares(case: Case) -> None:
    with torch.no_grad():
        predictions = predicted(case.model, case.ids("ids", 1, 32)).predictions
    case.require(all(each.share >= 0 for each in predictions), "a share is less than 0")
    case.within(abs(sum(each.share for each in predictions) - 1), 2.0**-52 * len(predictions), "their sum")
    for k, each in enumerate(predictions, 1):
        case.equal(each.logits.shape[:2], each.batch.ids.shape, f"the places of depth {k}")


@law(
    "predictor",
    "side-results",
    "its sublayers run in the model's phase, and what they tell in training comes out, once, by their path",
    kills="predictor-drops-its-side-results",
    examples=6,
)
def side_results(case: Case) -> None:
    """Losses and counts, which add where a sublayer is called more than once."""
    ids = case.ids("ids", case.integer("rows", 1, 2), LONGEST)
    given: dict[str, Tensor] = {}

    def hear(module: nn.Module, inputs: tuple[Any, ...], output: Output) -> None:
        case.equal(inputs[1].phase, "train", "the phase of a sublayer")
        for path, value in {**output.aux.losses, **output.aux.counts}.items():
            given[path] = given[path] + value if path in given else value

    nodes = [node for node in case.node.walk() if node.slot in SUBLAYERS]
    hooks = [case.model.get_submodule(node.path).register_forward_hook(hear) for node in nodes]
    with torch.no_grad():
        aux = predicted(case.model, ids).aux
    for hook in hooks:
        hook.remove()
    found = {path: value for path, value in {**aux.losses, **aux.counts}.items() if path in given}
    case.equal(sorted(found), sorted(given), "the paths of losses and counts")
    for path, value in given.items():
        case.equal(found[path], value, path)


@law(
    "predictor",
    "uses-as-declared",
    "it runs the model's head as often for each token as its cost says",
    kills="predictor-hides-its-head",
    examples=4,
)
def uses_as_declared(case: Case) -> None:
    ids = case.ids("ids", 1, 32)
    declared = [each for each in case.config.cost(case.node.site, "train") if isinstance(each, Uses)]
    for slot in ("embedding", "head"):
        node = getattr(case.spec.plan, slot)
        if not any(each.linears for each in node.walk()):
            continue  # what multiplies nothing costs nothing
        calls: list[int] = []
        hook = getattr(case.model, slot).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            case.model(ids, predict=False)
            without = len(calls)
            predicted(case.model, ids)
        hook.remove()
        times = sum(each.times for each in declared if each.slot == slot)
        case.equal(len(calls) - 2 * without, times, f"runs of the model's {slot} beyond its own")
