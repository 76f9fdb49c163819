"""Laws of objectives: a sum and a weight that add over rows, from labels that padding and other documents never give.

An objective is called with logits that are drawn, no model's. Shapes: B rows, T tokens, V vocabulary, N = B T.
"""

from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from composeformer import lazy
from composeformer.config import facts_of
from composeformer.tensors import Batch, ModelOutput
from composeformer.testing.bounds import STAGES, Terms, gap, size
from composeformer.testing.case import STEP, Case
from composeformer.testing.law import law
from composeformer.testing.subject import Subject
from composeformer.train.batch import TokenBatch

MOST, LONGEST = 3, 7
# What stands where no label is: finite, as a head makes it of finite hidden states.
HUGE = 1e4


class Loss(NamedTuple):
    """What an objective tells: `sum` and `gradient`, that of the logits (B, T, V), and the weight."""

    sum: Tensor
    weight: Tensor
    gradient: Tensor


def made(case: Case, config: Any = None) -> Any:
    """The objective."""
    return lazy.load(case.subject.implementation.module)(case.config if config is None else config)


def vocabulary(case: Case) -> int:
    """V."""
    return case.spec.model.vocab_size


def lose(case: Case, logits: Tensor, batch: Batch, objective: Any = None) -> Loss:
    """The loss of logits (B, T, V), with its gradient."""
    objective = made(case) if objective is None else objective
    leaf = logits.detach().clone().requires_grad_()
    hidden = leaf.new_zeros(*leaf.shape[:2], case.spec.model.hidden_size)
    total, weight = objective(ModelOutput(leaf, hidden), batch)
    case.require(total.ndim == 0 and weight.ndim == 0, "the sum and the weight are not of one number each")
    case.require(total.requires_grad, "no gradient reaches the sum")
    torch.autograd.backward(total)
    assert leaf.grad is not None
    return Loss(total.detach(), weight.detach(), leaf.grad)


def drawn(case: Case, rows: int, tokens: int, label: str = "") -> tuple[Tensor, Tensor]:
    """Logits and ids."""
    scale = case.choice(f"scale{label}", [1.0, 8.0])
    logits = case.normal(f"logits{label}", rows, tokens, vocabulary(case)) * scale
    return logits, case.ids(f"ids{label}", rows, tokens)


def alike(case: Case, found: Loss, wanted: Loss, logits: Tensor, batch: Batch, told: str) -> None:
    """Within what rounding may do to the sum and to the gradient; weights are equal. `logits` and `batch` are those of
    `wanted`, at which the condition is measured in float64.

    A loss is the logarithm of a sum that is no less than one, and its gradient a probability less one: where those
    nearly vanish, what rounding leaves of them is of the size of one.
    """
    case.equal(found.weight.double(), wanted.weight.double(), f"{told}: the weight")
    exact = logits.detach().double()
    plain, sums, gradients = lose(case, exact, batch), 1.0, 1.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        there = lose(case, exact * (1 + STEP * noise), batch)
        if size(plain.sum):
            sums = max(sums, gap(there.sum, plain.sum) / STEP / size(plain.sum))
        if size(plain.gradient):
            gradients = max(gradients, gap(there.gradient, plain.gradient) / STEP / size(plain.gradient))
    made_of = Terms(terms=vocabulary(case) + logits.shape[0] * logits.shape[1], stages=STAGES)
    wide = torch.promote_types(case.dtype, torch.float32)
    whole = max(size(plain.sum), logits.shape[0] * logits.shape[1])
    case.within(gap(found.sum, wanted.sum), made_of.error(wide) * sums * whole, f"{told}: the sum")
    # Each of the two has its own rounding in the dtype of logits.
    bound = made_of.error(case.dtype) * gradients * max(size(plain.gradient), 1.0)
    case.within(gap(found.gradient, wanted.gradient), bound, f"{told}: the gradient")


@law(
    "objective",
    "wide",
    "the loss of logits in any dtype is that of the same numbers in float64, to the rounding of fp32",
    kills="loss-in-bfloat16",
)
def wide(case: Case) -> None:
    logits, ids = drawn(case, case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST))
    batch = TokenBatch(ids).seen()
    found = lose(case, logits, batch)
    case.require(found.sum.dtype in (torch.float32, torch.float64), f"the sum is in {found.sum.dtype}")
    case.equal(found.gradient.dtype, logits.dtype, "the dtype of the gradient")
    alike(case, found, lose(case, logits.double(), batch), logits, batch, "in float64")


@law(
    "objective",
    "rows-add",
    "sums and weights of some rows and of the others are those of all, and a row's gradient is its own",
    kills="mean-over-the-batch",
)
def rows_add(case: Case) -> None:
    rows, tokens = case.integer("rows", 2, MOST), case.integer("tokens", 1, LONGEST)
    logits, ids = drawn(case, rows, tokens)
    first = case.integer("first", 1, rows - 1)
    batch = TokenBatch(ids).seen()
    parts = [lose(case, logits[at], TokenBatch(ids[at]).seen()) for at in (slice(first), slice(first, None))]
    sums, weights, gradients = zip(*parts, strict=True)
    found = Loss(sums[0] + sums[1], weights[0] + weights[1], torch.cat(gradients))
    alike(case, found, lose(case, logits, batch), logits, batch, "in two parts")


@law(
    "objective",
    "weight",
    "the weight of a batch, told from its tokens alone, is the one that a call returns, and finite",
    kills="weight-counts-tokens",
)
def weight(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    logits, ids = drawn(case, rows, tokens)
    seeds = torch.Generator().manual_seed(case.integer("padding", 0, 2**16))
    valid = torch.rand(rows, tokens, generator=seeds) < 0.7 if case.boolean("padded") else None
    documents = torch.randint(0, 2, ids.shape, generator=seeds).cumsum(1) if case.boolean("packed") else None
    batch, objective = TokenBatch(ids, valid, documents).seen(), made(case)
    before, found = objective.weight(batch), lose(case, logits, batch, objective)
    case.equal(before.ndim, 0, "the dimensions of the weight")
    case.equal(before.double(), found.weight.double(), "the weight told before")
    case.finite(found.weight, "the weight")
    case.require(float(before) >= 0, "the weight is negative")


@law(
    "objective",
    "nothing",
    "padding alone, and no rows at all, are a sum of zero of weight zero, with a gradient of zero",
    kills="mean-of-nothing",
)
def nothing(case: Case) -> None:
    rows, tokens = case.integer("rows", 0, MOST), case.integer("tokens", 1, LONGEST)
    logits, ids = drawn(case, rows, tokens)
    found = lose(case, logits * HUGE, TokenBatch(ids, torch.zeros(rows, tokens, dtype=torch.bool)).seen())
    for name, each in found._asdict().items():
        case.require(not bool(each.any()), f"of nothing the {name} is not zero")


@law(
    "objective",
    "padding",
    "padding before and behind a row, whatever it holds, changes no sum, weight or gradient, and has none",
    kills="padding-is-a-label",
)
def padding(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    before, behind = case.integer("before", 0, 3), case.integer("behind", 0, 3)
    width = before + tokens + behind
    logits, ids = drawn(case, rows, width)
    valid = torch.zeros(rows, width, dtype=torch.bool)
    real = slice(before, before + tokens)
    valid[:, real] = True
    seeds = torch.Generator().manual_seed(case.integer("documents", 0, 2**16))
    documents = torch.randint(0, 2, ids.shape, generator=seeds).cumsum(1) if case.boolean("packed") else None
    alone = TokenBatch(ids[:, real], None, None if documents is None else documents[:, real]).seen()
    what = torch.where(valid[..., None], logits, logits * HUGE)
    found = lose(case, what, TokenBatch(ids, valid, documents).seen())
    case.require(not bool(found.gradient[~valid].any()), "padding has a gradient")
    found = found._replace(gradient=found.gradient[:, real])
    alike(case, found, lose(case, logits[:, real], alone), logits[:, real], alone, "with padding")


@law(
    "objective",
    "documents",
    "documents packed into a row are those documents in rows of their own",
    kills="labels-across-documents",
)
def documents(case: Case) -> None:
    lengths = case.integers("lengths", 1, 4, longest=4)
    logits, ids = drawn(case, 1, sum(lengths))
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    batch = TokenBatch(ids, None, numbers).seen()
    found, start, parts = lose(case, logits, batch), 0, []
    for length in lengths:
        at = slice(start, start + length)
        parts.append(lose(case, logits[:, at], TokenBatch(ids[:, at]).seen()))
        start += length
    total, count = (torch.stack([each[i] for each in parts]).sum() for i in (0, 1))
    wanted = Loss(total, count, torch.cat([each.gradient for each in parts], 1))
    alike(case, found, wanted, logits, batch, "packed documents")


def has_execution(subject: Subject) -> str | None:
    """Why a law of fields of execution says nothing."""
    every = facts_of(subject.component.config).values()
    found = any(fact.affects == "execution" and not fact.required for fact in every)
    return None if found else "no field of its config is of execution alone"


@law(
    "objective",
    "execution",
    "fields that affect execution alone change no sum, weight or gradient",
    kills="last-chunk-is-lost",
    applies=has_execution,
)
def execution(case: Case) -> None:
    every = facts_of(type(case.config)).values()
    usual = {each.name: each.default for each in every if each.affects == "execution" and not each.required}
    logits, ids = drawn(case, case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST))
    batch = TokenBatch(ids).seen()
    plain = made(case, attrs.evolve(case.config, **usual))
    alike(case, lose(case, logits, batch), lose(case, logits, batch, plain), logits, batch, "by the defaults")


@law(
    "objective",
    "untouched",
    "a call changes nothing that it is given, and a second one gives the same",
    kills="labels-written-into-the-ids",
)
def untouched(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    logits, ids = drawn(case, rows, tokens)
    seeds = torch.Generator().manual_seed(case.integer("padding", 0, 2**16))
    valid = torch.rand(rows, tokens, generator=seeds) < 0.7
    numbers = torch.randint(0, 2, ids.shape, generator=seeds).cumsum(1)
    batch, objective = TokenBatch(ids, valid, numbers).seen(), made(case)
    kept = [None if each is None else each.clone() for each in batch[:4]]
    first = lose(case, logits, batch, objective)
    other = drawn(case, 1, 2, " between")
    lose(case, other[0], TokenBatch(other[1]).seen(), objective)
    for name, now, before in zip(Batch._fields, batch, kept, strict=False):
        case.equal(now, before, f"{name} after a call")
    again = lose(case, logits, batch, objective)
    for name, one, two in zip(Loss._fields, first, again, strict=True):
        case.equal(two, one, f"the {name} of a second call")
