"""From logits to a token: greedy, or a draw among what temperature, top-k, top-p and min-p leave.

The filters are those of transformers' logits warpers, in their order. Top-k and min-p keep all that tie
with the last one kept; top-p (arXiv:1904.09751) keeps the fewest of the likeliest tokens whose
probabilities reach `top_p`, ties going to the lowest id. min-p is arXiv:2407.01082.

Draws are a hash of (seed, prompt, step), not the state of a generator: so a sample depends neither on its
neighbours in a batch nor on the device, nor on how many numbers were drawn before.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from hashlib import blake2b
from math import isfinite
from typing import NamedTuple

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from composeformer.errors import InputError, show


@attrs.frozen(kw_only=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy, whatever the filters; None leaves a filter out.

    Raises InputError with one line for each value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        top_p = self.top_p is None or (_number(self.top_p, 0.0, 1.0) and self.top_p > 0)
        checks = (
            ("temperature", _number(self.temperature, 0.0), "a finite number >= 0"),
            ("top_k", self.top_k is None or _integer(self.top_k, 1), "an integer >= 1"),
            ("top_p", top_p, "a number > 0 and <= 1"),
            ("min_p", self.min_p is None or _number(self.min_p, 0.0, 1.0), "a number >= 0 and <= 1"),
            ("seed", _integer(self.seed, 0), "an integer >= 0"),
        )
        wrong = [
            f"{name} = {show(getattr(self, name))}: must be {allowed}"
            for name, fits, allowed in checks
            if not fits
        ]
        if wrong:
            raise InputError(*wrong)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Candidates(NamedTuple):
    """The tokens that may be drawn, ids ascending, with their probabilities in float64; both on the CPU."""

    ids: Int[Tensor, " N"]
    probabilities: Float[Tensor, " N"]


class Draws:
    """The uniform random numbers of one row: the same for the same seed, prompt and copy."""

    def __init__(self, seed: int, prompt: Sequence[int], copy: int = 0) -> None:
        """`copy` tells equal prompts apart that want different samples."""
        text = f"{seed}/{copy}/" + ",".join(map(str, prompt))
        self._key = blake2b(text.encode(), digest_size=32).digest()

    def uniform(self, step: int, purpose: bytes = b"") -> float:
        """A number in [0, 1) with 53 random bits, for the new token `step`; each purpose has its own."""
        digest = blake2b(step.to_bytes(8, "little") + purpose, key=self._key, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def candidates(logits: Float[Tensor, " V"], sampling: Sampling) -> Candidates:
    """What the filters of a sampling with a temperature leave of one row's logits."""
    # The largest logit is subtracted first, so that a tiny temperature can not overflow.
    scores = logits.to("cpu", torch.float64)
    scores = (scores - scores.max()) / sampling.temperature
    ids = torch.arange(scores.shape[0])
    if sampling.top_k is not None and sampling.top_k < scores.shape[0]:
        kept = scores >= scores.topk(sampling.top_k).values[-1]
        ids, scores = ids[kept], scores[kept]
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = scores.softmax(0).sort(descending=True, stable=True)
        above = ordered.cumsum(0) - ordered
        # The likeliest token stays whatever the rounding of the sums.
        above[0] = 0.0
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(0, order, above < sampling.top_p)
        ids, scores = ids[kept], scores[kept]
    if sampling.min_p is not None:
        probabilities = scores.softmax(0)
        kept = probabilities >= sampling.min_p * probabilities.max()
        ids, scores = ids[kept], scores[kept]
    return Candidates(ids, scores.softmax(0))


def pick(kept: Candidates, uniform: float) -> int:
    """The token at the quantile `uniform` of the candidates; one of probability zero is never it."""
    cumulative = kept.probabilities.cumsum(0)
    place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    if place == len(kept.ids):  # the product was rounded up to the sum
        place = int(kept.probabilities.nonzero()[-1])
    return int(kept.ids[place])


def choose(
    logits: Float[Tensor, "B V"],
    sampling: Sampling,
    draws: Sequence[Draws],
    steps: Sequence[int],
    rows: Sequence[int],
) -> list[int]:
    """The next token of each row in `rows`; greedy ties go to the lowest id. `draws` and `steps` have all B.

    Raises InputError where a row's logits have no finite maximum.
    """
    picked = logits[list(rows)] if len(rows) < logits.shape[0] else logits
    for row, value in zip(rows, picked.amax(-1).tolist(), strict=True):
        check_finite(value, row, steps[row])
    if sampling.greedy:
        greedy: list[int] = picked.argmax(-1).tolist()
        return greedy
    kept = [candidates(row_logits, sampling) for row_logits in picked.to("cpu")]
    return [pick(one, draws[row].uniform(steps[row])) for row, one in zip(rows, kept, strict=True)]


def check_finite(largest: float, row: int, step: int) -> None:
    """Raises InputError where the largest logit of a row's new token is not finite."""
    error = not_finite(largest, row, step)
    if error is not None:
        raise error


def not_finite(largest: float, row: int, step: int, what: str = "") -> InputError | None:
    """The error where the largest logit of a row's new token, or of `what` for it, is not finite."""
    if isfinite(largest):
        return None
    where = f"prompt {row}, {what}new token {step}"
    return InputError(f"{where}: the logits are not finite ({largest}): the weights are likely damaged")


def _integer(value: object, minimum: int) -> bool:
    return type(value) is int and value >= minimum


def _number(value: object, minimum: float, maximum: float = float("inf")) -> bool:
    return type(value) in (int, float) and isfinite(value) and minimum <= value <= maximum  # type: ignore[arg-type, operator]
