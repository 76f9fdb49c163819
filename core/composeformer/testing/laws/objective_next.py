"""Laws that objectives claim of what they learn: the next token by cross-entropy, whatever tokens are called.

    sum = sum_t -log p_t(label_t)        d sum / d logits_t = p_t - [label_t]        label_t = token t + 1

where both are real and of one document; elsewhere no label, and no gradient.

Shapes: B rows, T tokens, V vocabulary.
"""

import torch
from torch import Tensor

from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.objective import LONGEST, MOST, Loss, alike, drawn, lose, vocabulary
from composeformer.train.batch import TokenBatch


def packed(case: Case) -> tuple[Tensor, TokenBatch]:
    """Logits and a batch: padding anywhere, or none; documents, or none."""
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    logits, ids = drawn(case, rows, tokens)
    seeds = torch.Generator().manual_seed(case.integer("seen", 0, 2**16))
    valid = torch.rand(rows, tokens, generator=seeds) < 0.8 if case.boolean("padded") else None
    documents = torch.randint(0, 2, ids.shape, generator=seeds).cumsum(1) if case.boolean("packed") else None
    return logits, TokenBatch(ids, valid, documents)


@law(
    "objective",
    "next-token",
    "the sum is of -log p of each token's successor in its document, the weight their number",
    kills="labels-not-shifted",
    claimed=True,
)
def next_token(case: Case) -> None:
    """By a loop over tokens in float64."""
    logits, batch = packed(case)
    ids, valid, documents, _ = batch
    wanted, count = torch.zeros((), dtype=torch.float64), 0
    gradient = torch.zeros(logits.shape, dtype=torch.float64)
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            real = valid is None or bool(valid[row, t] and valid[row, t + 1])
            if not real or (documents is not None and documents[row, t] != documents[row, t + 1]):
                continue
            label = int(ids[row, t + 1])
            logs = logits[row, t].double().log_softmax(-1)
            wanted, count = wanted - logs[label], count + 1
            gradient[row, t] = logs.exp()
            gradient[row, t, label] -= 1
    right = Loss(wanted, torch.tensor(count), gradient)
    alike(case, lose(case, logits, batch.seen()), right, logits, batch.seen(), "by definition")


@law(
    "objective",
    "renamed",
    "tokens under other ids, and their logits with them, have the same loss",
    kills="token-zero-is-ignored",
    claimed=True,
)
def renamed(case: Case) -> None:
    logits, batch = packed(case)
    seed = case.integer("names", 0, 2**16)
    order = torch.randperm(vocabulary(case), generator=torch.Generator().manual_seed(seed))
    found = lose(case, logits[..., order], batch._replace(ids=torch.argsort(order)[batch.ids]).seen())
    back = found._replace(gradient=found.gradient[..., torch.argsort(order)])
    alike(case, back, lose(case, logits, batch.seen()), logits, batch.seen(), "under other names")


@law(
    "objective",
    "shift",
    "a number added to all logits of a token changes no loss, however large",
    kills="logarithm-of-a-sum-of-exponentials",
    claimed=True,
)
def shift(case: Case) -> None:
    logits, batch = packed(case)
    # Multiples of a quarter, so that no dtype rounds them when they are moved.
    logits = (logits * 4).round().clamp(-16, 16) / 4
    moved = logits + case.choice("offset", [32.0, -32.0]) if case.dtype == torch.bfloat16 else logits + 1024.0
    found, seen = lose(case, moved, batch.seen()), batch.seen()
    alike(case, found, lose(case, logits, seen), moved, seen, "moved")
