"""Laws of feed-forward networks: each token alone, given its id; padding is nowhere; side results add.

Shapes: B rows, T tokens, D features.
"""

from functools import partial

import torch
from torch import Tensor

from composeformer.contracts import Phase
from composeformer.counting import count_positions
from composeformer.decoder import Model
from composeformer.tensors import Batch, Output
from composeformer.testing.bounds import size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.told import Told, alike, back, ragged, row_by_row, shuffled, together

MOST, LONGEST = 3, 6


def transform(
    case: Case, model: Model, x: Tensor, ids: Tensor, valid: Tensor | None = None, phase: Phase = "train"
) -> Output:
    """The ffn of a model over x (B, T, D) as a layer calls it."""
    positions = count_positions(ids, None, valid)
    found: Output = case.part_of(model)(x, Batch(ids, positions, None, valid, model.rotary(positions), phase))
    return found


def told(
    case: Case,
    x: Tensor,
    ids: Tensor,
    cotangent: Tensor,
    valid: Tensor | None = None,
    model: Model | None = None,
) -> Told:
    """An ffn's output and side results, and the gradients of cotangent . output plus all losses."""
    model = case.model if model is None else model
    x = x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    hidden, aux = transform(case, model, x, ids, valid)
    case.require(hidden.requires_grad, "no gradient reaches the output")
    return back(model, x, hidden, aux, cotangent)


def value(case: Case, model: Model, x: Tensor, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """The output and the losses as one vector, in the wider dtype of the two."""
    hidden, aux = transform(case, model, x, ids, valid)
    hidden = hidden + x[..., :0].sum()
    if valid is not None:
        hidden = hidden[valid]
    return torch.cat([hidden.flatten(), *(each.sum()[None] for each in aux.losses.values())])


def settled(case: Case, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A stream and token ids, at which the case's condition is known."""
    x, ids = case.stream("x", rows, tokens), case.ids("ids", rows, tokens)
    case.settle(lambda model, y: value(case, model, y, ids), x)
    return x, ids


@law(
    "ffn",
    "token-alone",
    "a token by itself gives what it gives at any place of any batch",
    kills="tokens-beyond-a-capacity-are-dropped",
)
def token_alone(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = settled(case, rows, tokens)
    flat, flat_ids = x.flatten(0, 1), ids.flatten()
    one, order = case.integer("one", 0, rows * tokens - 1), shuffled(case, "order", rows * tokens)
    with torch.no_grad():
        whole, aux = transform(case, case.model, x, ids)
        alone = transform(case, case.model, flat[one][None, None], flat_ids[one][None, None]).hidden
        elsewhere = flat[order].view(tokens, rows, -1), flat_ids[order].view(tokens, rows)
        moved, moved_aux = transform(case, case.model, *elsewhere)
    outputs = whole.flatten(0, 1)
    case.close(alone[0, 0], outputs[one], "a token by itself", scale=size(outputs))
    case.close(moved.flatten(0, 1), outputs[order], "tokens at other places")
    # Losses may be of sequences, and those are others; counts are of tokens.
    for name, count in aux.counts.items():
        case.equal(moved_aux.counts.get(name), count, f"tokens at other places: the count {name}")


@law(
    "ffn",
    "others-do-not-matter",
    "what other tokens hold, be it NaN, changes neither a token's output nor its gradient",
    kills="scaled-by-the-largest-of-all-tokens",
)
def others_do_not_matter(case: Case) -> None:
    tokens = case.integer("tokens", 2, LONGEST)
    x, ids = settled(case, 1, tokens)
    spoilt = shuffled(case, "spoilt", tokens)[: case.integer("how many", 1, tokens - 1)]
    rest = torch.ones(tokens, dtype=torch.bool).index_fill(0, spoilt, False)
    y, cotangent = x.clone(), case.stream("cotangent", 1, tokens)
    y[:, spoilt] = case.choice("what", [torch.nan, torch.inf, 1e30])
    cotangent[:, spoilt] = 0
    found = []
    for entered in (x, y):
        entered = entered.clone().requires_grad_()
        hidden = transform(case, case.model, entered, ids).hidden
        torch.autograd.backward(hidden[:, rest], cotangent[:, rest])
        assert entered.grad is not None
        found.append({"output": hidden.detach()[:, rest], "input": entered.grad[:, rest]})
    case.close(found[1], found[0], "tokens beside spoilt ones", terms=tokens)


@law(
    "ffn",
    "padding",
    "padding, wherever it stands and whatever it holds, is in no output, count, loss or gradient",
    kills="padding-is-routed",
)
def padding(case: Case) -> None:
    """Against each row by itself, without its padding: so rows of unlike lengths add, too."""
    valid = ragged(case, MOST, LONGEST)
    x, ids = case.stream("x", *valid.shape), case.ids("ids", *valid.shape)
    case.settle(lambda model, y: value(case, model, y, ids, valid), x)
    cotangent = case.stream("cotangent", *valid.shape)
    cotangent = cotangent.masked_fill(~valid[:, :, None], 0)
    what = case.choice("what", [torch.nan, 1e30])
    found = told(case, x.masked_fill(~valid[:, :, None], what), ids, cotangent, valid)
    if what == what:
        case.finite(found.gradients["output"], "the output at padding that is finite")
    row_by_row(case, partial(told, case), found, (x, ids, cotangent), valid)


@law(
    "ffn",
    "rows-add",
    "losses, counts and gradients of some rows and of the others add to those of all",
    kills="balance-over-the-whole-batch",
)
def rows_add(case: Case) -> None:
    rows, tokens = case.integer("rows", 2, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = settled(case, rows, tokens)
    cotangent = case.stream("cotangent", rows, tokens)
    first = case.integer("first", 1, rows - 1)
    parts = [told(case, x[at], ids[at], cotangent[at]) for at in (slice(first), slice(first, None))]
    alike(case, together(parts), told(case, x, ids, cotangent), "in two parts", rows * tokens)


@law(
    "ffn",
    "no-tokens",
    "no tokens give no output, zero losses and counts, and gradients of zero",
    kills="no-tokens-no-graph",
)
def no_tokens(case: Case) -> None:
    rows = case.integer("rows", 0, 2)
    tokens = case.integer("tokens", 0, 2)
    x, ids = case.stream("x", rows, tokens), case.ids("ids", rows, tokens)
    empty = not x.numel() and case.boolean("no mask")
    valid = None if empty else torch.zeros(rows, tokens, dtype=torch.bool)
    found = told(case, x, ids, torch.zeros_like(x), valid)
    usual = told(case, case.stream("y", 1, 1), case.ids("an id", 1, 1), case.stream("cotangent", 1, 1))
    case.equal(
        sorted(found.gradients), sorted(usual.gradients), "what has a gradient, of no token and of one"
    )
    case.equal(tuple(found.gradients["output"].shape), tuple(x.shape), "the shape of the output")
    rest = {name: each for name, each in found.gradients.items() if name != "output"}
    for name, each in {**rest, **found.losses, **found.counts}.items():
        case.require(not bool(each.any()), f"no tokens: {name} is not zero")
