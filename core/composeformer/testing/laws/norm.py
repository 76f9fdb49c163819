"""Laws of norms: each token alone, in float32 or wider inside, whatever the size and dtype of what comes.

What a norm is exactly, parts claim: `unit` is its closed form at initial values (divided by the root of the mean square
plus eps; with `shift`, of the deviation from the mean), `gain` what its weights do, `scale` what its eps means.

Shapes: B rows, T tokens, W width of the norm.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from composeformer.assemble import build
from composeformer.decoder import Model
from composeformer.testing.bounds import SAFETY, STAGES, roundoff, size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.variants import variant

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A result is rounded where it is normalised, where a gain multiplies, where a shift is added, where it is given back.
ROUNDINGS = 4
# Features, where roundings of each are to cancel.
MANY = 8192
# Sizes of tokens whose features, divided by them, are rounded one way as often as the other: near 1, or another ratio
# of small numbers, numbers of few bits all fall on the same side.
SIZES = (1.1, 1.37, 1.61, 1.73)


def normed(case: Case, model: Model, x: Tensor) -> Tensor:
    """The norm of a model over x."""
    found: Tensor = case.part_of(model)(x)
    return found


def drawn(case: Case, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    """Tokens (B, T, W) around an offset, of some size that their squares do not overflow in float32."""
    rows, tokens = case.integer("rows", 1, 2), case.integer("tokens", 1, 6)
    largest, smallest = (9, -9) if dtype == torch.float16 else (50, -50)
    x = case.normal("x", rows, tokens, case.node.site.width, dtype=torch.float64) + offset
    return (x * 2.0 ** case.integer("power", smallest, largest)).to(dtype)


def wide_bound(case: Case, x: Tensor, wanted: Tensor) -> float:
    """Of a norm that computes in float32 or wider, and rounds to the dtype of x, or of its weights, what it gives."""
    wide = roundoff(torch.promote_types(x.dtype, torch.float32))
    inside = SAFETY * sqrt(x.shape[-1] + STAGES) * wide * case.condition.output
    weights = dict(case.part.named_parameters())
    outside = ROUNDINGS * max(roundoff(each.dtype) for each in (x, *weights.values()))
    return inside * size(wanted) + outside * (size(wanted) + size(weights))


@law(
    "norm",
    "each-token-alone",
    "a token's output is its own norm, whatever the others hold, NaN included",
    kills="norm-over-the-tokens",
    examples=8,
)
def each_token_alone(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 3), case.integer("tokens", 2, 6)
    one = case.integer("one", 0, tokens - 1)
    x = case.stream("x", rows, tokens)
    case.settle(lambda model, y: normed(case, model, y), x)
    spoilt = torch.full_like(x, torch.nan)
    spoilt[:, one] = x[:, one]
    with torch.no_grad():
        whole = normed(case, case.model, x)
        case.equal(
            normed(case, case.model, spoilt)[:, one], whole[:, one], "a token beside others that are NaN"
        )
        alone = normed(case, case.model, x[:, one])
    case.close(alone, whole[:, one], "a token by itself", scale=size(whole))


@law(
    "norm",
    "wide",
    "it computes in float32 or wider, whatever dtype comes in, and gives that dtype back",
    kills="norm-in-the-dtype-of-its-input",
    examples=6,
)
def wide(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 2), case.integer("tokens", 1, 6)
    offset, power = case.choice("offset", (0.0, 4.0, 64.0)), case.integer("power", -9, 9)
    base = case.normal("x", rows, tokens, case.node.site.width, dtype=torch.float64) + offset
    for dtype in DTYPES:
        # Whose squares overflow, or vanish, in the dtype itself and not in float32.
        ends = (9, -9) if dtype == torch.float16 else (50, -50)
        for each in (*ends, power):
            _wide(case, (base * 2.0**each).to(dtype))


def _wide(case: Case, x: Tensor) -> None:
    case.settle(lambda model, y: normed(case, model, y), x)
    with torch.no_grad():
        found, wanted = normed(case, case.model, x), normed(case, case.judge, x.double())
    case.equal(found.dtype, x.dtype, "the dtype of the output")
    limit = torch.finfo(x.dtype).max
    if size(wanted) < limit:
        case.within(float((found.double() - wanted).abs().max()), wide_bound(case, x, wanted), "the output")


@law(
    "norm",
    "true-scale",
    "what a token is divided by is not rounded to a narrow dtype: over many features roundings cancel, that does not",
    kills="norm-rounds-what-it-divides-by",
    examples=6,
)
def true_scale(case: Case) -> None:
    spec = case.spec.with_({"model.hidden_size": MANY})
    node = case.find(spec)
    width = 0 if node is None else node.site.width
    if width < MANY:  # of heads, or of a latent
        return
    part: Any = case.part_of(case.built(spec))
    dtype = torch.bfloat16
    x = case.normal("x", len(SIZES), width, dtype=torch.float64)
    x = (x / x.square().mean(-1, keepdim=True).sqrt() * torch.tensor(SIZES)[:, None]).to(dtype)
    with torch.no_grad():
        found, wanted = part(x).double(), part(x.double())
    found, wanted = (each - each.mean(-1, keepdim=True) for each in (found, wanted))
    power = wanted.square().sum(-1)
    scale = (found * wanted).sum(-1) / power
    # Of independent roundings each feature adds its share of the power.
    noise = sqrt(ROUNDINGS) * roundoff(dtype) * wanted.pow(4).sum(-1).sqrt() / power
    worst = int(((scale - 1).abs() / noise).argmax())
    told = f"the scale of a token of {width} features"
    case.within(float((scale - 1).abs()[worst]), SAFETY * float(noise[worst]), told)


@law(
    "norm",
    "finite",
    "zeros, tiny and huge tokens have finite outputs and gradients",
    kills="norm-divides-by-the-plain-root",
    examples=10,
)
def finite(case: Case) -> None:
    x = drawn(case, getattr(torch, case.choice("of", DTYPES_BY_NAME)))
    zeros = case.integers("zeros", 0, x.shape[1] - 1)
    x[:, zeros] = 0
    judge = case.gradients(case.judge, lambda y: normed(case, case.judge, y), x.double())
    found = case.gradients(case.model, lambda y: normed(case, case.model, y), x)
    for name, each in judge.items():
        case.finite(each, f"the reference in float64: {name}")
        # Twice, for roundings; what does not fit the dtype may overflow.
        if name in found and 2 * size(each) < torch.finfo(found[name].dtype).max:
            case.finite(found[name], name)


@law(
    "norm",
    "scale",
    "c times the input, normalised, is the input normalised with eps / c^2; without an eps, the same",
    kills="norm-eps-is-its-own",
    claimed=True,
)
def scale(case: Case) -> None:
    x, c = near_eps(case), 2.0 ** case.integer("power", -6, 6)
    case.settle(lambda model, y: normed(case, model, y), x)
    eps = getattr(case.config, "eps", None)
    other = case.model if eps is None else case.built(variant(case, eps=eps / c**2))
    with torch.no_grad():
        found, wanted = normed(case, case.model, x), normed(case, other, x / c)
    case.close(found, wanted, "against the input divided, with a larger eps", terms=x.shape[-1])


@law(
    "norm",
    "shift",
    "a number added to all features changes nothing",
    kills="norm-keeps-the-mean",
    claimed=True,
)
def shift(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 2), case.integer("tokens", 1, 4)
    # In eighths, so that no dtype rounds the sums.
    x = (case.stream("x", rows, tokens) * 8).round().clamp(-31, 31) / 8
    c = case.integer("c", -16, 16)
    case.settle(lambda model, y: normed(case, model, y), x + c)
    with torch.no_grad():
        found, wanted = normed(case, case.model, x + c), normed(case, case.model, x)
    case.close(found, wanted, "the input shifted", terms=x.shape[-1])


@law(
    "norm",
    "unit",
    "at initial values it is x / sqrt(mean(x^2) + eps); where shifts change nothing, of x less its mean",
    kills="norm-of-the-unbiased-variance",
    claimed=True,
)
def unit(case: Case) -> None:
    x = near_eps(case)
    case.settle(lambda _, y: closed(case, y), x)
    with torch.no_grad():
        found = normed(case, build(case.spec, seed=0), x)
        case.close(found, closed(case, x.double()), "the norm", terms=x.shape[-1])


@law(
    "norm",
    "gain",
    "each of its weights multiplies the normalised features, or is added, each feature by its own",
    kills="norm-of-what-the-gain-made",
    claimed=True,
)
def gain(case: Case) -> None:
    x = near_eps(case)
    width = x.shape[-1]
    case.settle(lambda model, y: normed(case, model, y), x)
    step = case.normal("step", width)
    with torch.no_grad():
        plain = normed(case, build(case.spec, seed=0), x)
        before = normed(case, case.model, x)
        for name, weight in case.node.weights.items():
            if weight.shape != (width,):
                continue
            parameter: Any = case.part.get_parameter(name)
            kept = parameter.detach().clone()
            parameter.copy_(kept + step)
            moved = (parameter - kept).double()
            gained = (normed(case, case.model, x).double() - before.double()).nan_to_num(nan=torch.inf)
            parameter.copy_(kept)
            scale = size(before) + size(moved) * (1 + size(plain))
            told = f"what a change of {name} adds"
            sorts = moved * plain, moved.expand_as(gained)
            nearest = min(sorts, key=lambda one: float((gained - one).abs().max()))
            case.close(gained, nearest, told, scale=scale, terms=width)


DTYPES_BY_NAME = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def near_eps(case: Case) -> Tensor:
    """Tokens (B, T, W) of about the size at which an eps is half of what is divided by."""
    rows, tokens = case.integer("rows", 1, 2), case.integer("tokens", 1, 4)
    eps = getattr(case.config, "eps", None) or 1.0
    return case.stream("x", rows, tokens) * sqrt(eps) * 2.0 ** case.integer("size", -2, 3)


def closed(case: Case, x: Tensor) -> Tensor:
    """x (..., W) over the root of its mean square and eps, less its mean first where that changes nothing."""
    if "shift" in case.subject.component.claims:
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + (getattr(case.config, "eps", None) or 0.0)).sqrt()
