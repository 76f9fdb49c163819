"""Laws of whole models: what stands beside a token, and must not matter. Other rows, padding, other documents, later
tokens; through layers, predictors and losses.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from composeformer.decoder import Model
from composeformer.testing.bounds import gap
from composeformer.testing.models import ModelCase, model_law
from composeformer.train import Objective, TokenBatch, trainer

MOST_PADDING = 3
# Named by what a token has, not by what a batch sums up.
BY_TOKEN = "logits"
# What an objective claims whose sum and weight are those of its labels, each alone.
LABELS = "next-token"


def summed(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The results of several batches together: tokens one after the other, all else added up."""
    every = dict.fromkeys(name for one in found for name in one)
    results: dict[str, Tensor] = {}
    for name in every:
        there = [one[name] for one in found if name in one]
        by_token = name == BY_TOKEN
        results[name] = (
            torch.cat([each.flatten(0, -2) for each in there]) if by_token else sum(there[1:], there[0])
        )
    return results


def row_of(batch: TokenBatch, rows: Sequence[int]) -> TokenBatch:
    """Some rows of a batch."""
    return TokenBatch(*(None if each is None else each[list(rows)] for each in batch))  # type: ignore[arg-type]


def whole(case: ModelCase, model: Model, batch: TokenBatch) -> dict[str, Tensor]:
    """The results of a batch, by token."""
    found = case.results(model, batch)
    return {**found, BY_TOKEN: found[BY_TOKEN].flatten(0, -2)}


@model_law("rows", "rows add up, in whatever order and batches", kills="losses-are-means", examples=8)
def rows(case: ModelCase) -> None:
    batch = case.batch
    wanted = case.measured("whole", lambda model: whole(case, model, batch))
    cut = case.integer("cut", 0, len(batch.ids) - 1)
    order = [*range(cut, len(batch.ids)), *range(cut)]
    pieces = (
        [order[: len(order) - cut], order[len(order) - cut :]]
        if case.boolean("two")
        else [[n] for n in order]
    )
    found = summed([case.results(case.model, row_of(batch, piece)) for piece in pieces if piece])
    real = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
    places = torch.arange(int(real.sum()))
    counted = torch.zeros_like(batch.ids)
    counted[real] = places
    index = torch.cat([counted[n][real[n]] for n in order])
    logits = torch.empty_like(wanted.values[BY_TOKEN])
    logits[index] = found[BY_TOKEN]
    case.agree({**found, BY_TOKEN: logits}, wanted, "rows in pieces")


@model_law(
    "padding",
    "padding at the ends of rows changes no logit, loss, count or gradient",
    kills="mixture-counts-padding",
    examples=10,
)
def padding(case: ModelCase) -> None:
    batch = case.batch
    wanted = case.measured("whole", lambda model: whole(case, model, batch))
    left, right = case.integer("left", 0, MOST_PADDING), case.integer("right", 0, MOST_PADDING)
    count, length = batch.ids.shape
    wide = case.ids("ids of padding", count, left + length + right)
    wide[:, left : left + length] = batch.ids
    valid = torch.zeros_like(wide, dtype=torch.bool)
    valid[:, left : left + length] = True if batch.valid is None else batch.valid
    documents = None
    if batch.documents is not None:
        documents = torch.randint(4, wide.shape, generator=torch.Generator().manual_seed(left))
        documents[:, left : left + length] = batch.documents
    found = whole(case, case.model, TokenBatch(wide, valid, documents))
    case.agree(found, wanted, "with padding")


@model_law(
    "holes",
    "padding between tokens changes no logit",
    kills="padding-moves-positions",
    examples=8,
)
def holes(case: ModelCase) -> None:
    batch = case.rows("rows", padded=False, packed=False)
    count, length = batch.ids.shape
    more = case.integer("more", 1, MOST_PADDING)
    wide = case.ids("ids of padding", count, length + more)
    order = torch.rand(wide.shape, generator=torch.Generator().manual_seed(case.integer("places", 0, 99)))
    valid = torch.zeros_like(wide, dtype=torch.bool)
    valid.scatter_(1, order.argsort(1)[:, :length], True)
    wide[valid] = batch.ids.flatten()

    def logits(model: Model, ids: Tensor, real: Tensor | None) -> dict[str, Tensor]:
        with torch.no_grad():
            found = model(ids, valid=real, predict=False).logits
        return {BY_TOKEN: found.flatten(0, 1) if real is None else found[real]}

    wanted = case.measured("rows", lambda model: logits(model, batch.ids, None))
    case.agree(logits(case.model, wide, valid), wanted, "with holes")


@model_law(
    "documents",
    "documents packed into a row are as they are in rows of their own",
    kills="predictor-crosses-documents",
    examples=12,
)
def documents(case: ModelCase) -> None:
    """Side losses are sums over sequences, and a packed row is one: they are left out."""
    lengths = case.integers("lengths", 1, 4, 2, 4)
    # One that comes back after another is a new document.
    steps = case.integers("steps", 1, 2, len(lengths), len(lengths))
    numbers = [sum(steps[:place]) % 3 for place in range(len(lengths))]
    ids = torch.split(case.ids("ids", 1, sum(lengths))[0], lengths)
    apart = [TokenBatch(each[None]) for each in ids]
    names = torch.tensor([name for name, length in zip(numbers, lengths, strict=True) for _ in range(length)])
    packed = TokenBatch(torch.cat(ids)[None], None, names[None])

    def separate(model: Model) -> dict[str, Tensor]:
        return summed([case.results(model, each, sides=False) for each in apart])

    wanted = case.measured("apart", separate)
    found = case.results(case.model, packed, sides=False)
    case.agree({**found, BY_TOKEN: found[BY_TOKEN].flatten(0, -2)}, wanted, "packed")


@model_law(
    "causal",
    "a later token changes no logit, and no prediction of tokens before it",
    kills="mask-lets-the-next-token-in",
    examples=8,
)
def causal(case: ModelCase) -> None:
    ids = case.ids("ids", case.integer("rows", 1, 2), case.integer("tokens", 2, 8))
    changed = case.integer("changed", 1, ids.shape[1] - 1)
    other = ids.clone()
    other[:, changed:] = case.ids("others", len(ids), ids.shape[1] - changed)

    def before(model: Model, ids: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            output = model(ids, predict=model.predictor is not None)
        found = {"logits": output.logits[:, :changed]}
        for depth, each in enumerate(output.predictions, 1):
            if changed > depth:
                found[f"prediction {depth}"] = each.logits[:, : changed - depth]
        return found

    wanted = case.measured("before", lambda model: before(model, ids))
    case.agree(before(case.model, other), wanted, "before a changed token")


def of_labels(case: ModelCase) -> Objective:
    """An objective that claims to be a sum over labels: the case's own, or the default one."""
    own = case.spec.singles["objective"]
    if own is not None and LABELS in own.component.claims:
        return case.objective
    default = case.spec.registry.default("objective")
    if default is None or LABELS not in default.claims:
        case.draw.reject("no objective counts labels")
    found: Objective = trainer(case.built(case.spec.with_({"objective": {"kind": default.kind}})))[0]
    return found


@model_law(
    "predictions",
    "a prediction of depth k is held to the token k + 1 places on, if all up to it are real and of one document;"
    " it changes no logit",
    kills="predictions-are-labelled-one-early",
    examples=15,
)
def predictions(case: ModelCase) -> None:
    """Each pair of a token and its label is made a row of its own, of which an objective of labels is asked."""
    batch, model = case.batch, case.model
    ids, valid, documents, _ = batch
    objective = of_labels(case)
    told = {"valid": valid, "documents": documents, "phase": "train"}
    with torch.no_grad():
        plain = model(ids, **told, predict=False)
        found = model(ids, **told, predict=model.predictor is not None)
    case.equal(found.logits, plain.logits, "logits beside predictions")
    real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    numbers = torch.zeros_like(ids) if documents is None else documents
    for depth, each in enumerate((plain, *found.predictions)):
        kept = each.logits.shape[1]
        case.equal(kept, ids.shape[1] - depth, f"tokens that depth {depth} sees")
        pairs, logits = [], []
        for row, t in ((row, t) for row in range(len(ids)) for t in range(kept - 1)):
            if real[row, t : t + depth + 2].all() and len(set(numbers[row, t : t + depth + 2].tolist())) == 1:
                pairs.append(ids[row, t + depth : t + depth + 2])
                logits.append(each.logits[row, [t, t]])
        seen = batch.seen() if depth == 0 else found.predictions[depth - 1].batch
        loss, weight = objective(plain._replace(logits=each.logits), seen)
        if not pairs:
            case.equal(float(weight), 0.0, f"the weight of depth {depth}")
            continue
        apart = TokenBatch(torch.stack(pairs)).seen()
        wanted, labels = objective(plain._replace(logits=torch.stack(logits)), apart)
        case.equal(float(weight), float(labels), f"the weight of depth {depth}")
        scale = float(wanted.abs()) + len(pairs) * float(each.logits.abs().max())
        case.within(gap(loss, wanted), case.error_in(torch.float64) * scale, f"the loss of depth {depth}")
