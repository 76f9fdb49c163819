"""Laws of heads: a token's logits are its own hidden state's, and a tied head is the embedding's table.

Shapes: B rows, T tokens, D hidden size, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from composeformer.assemble import in_dtype
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.spec import Spec
from composeformer.testing.bounds import size
from composeformer.testing.case import Case
from composeformer.testing.law import law


def read(case: Case, model: Model, x: Tensor) -> Tensor:
    """Logits (B, T, V) of hidden states (B, T, D)."""
    logits: Tensor = case.part_of(model)(x)
    return logits


@law(
    "head",
    "each-token-alone",
    "a token's logits are those of its own hidden state, whatever the others hold",
    kills="head-centres-over-tokens",
    examples=6,
)
def each_token_alone(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 3), case.integer("tokens", 2, 6)
    one = case.integer("one", 0, tokens - 1)
    x = case.stream("x", rows, tokens)
    case.settle(lambda model, y: read(case, model, y), x)
    spoilt = torch.full_like(x, torch.nan)
    spoilt[:, one] = x[:, one]
    with torch.no_grad():
        whole = read(case, case.model, x)
        beside = read(case, case.model, spoilt)[:, one]
        itself = read(case, case.model, x[:, one : one + 1])[:, 0]
    case.equal(whole.shape, (rows, tokens, case.spec.model.vocab_size), "the shape of the logits")
    case.equal(beside, whole[:, one], "a token beside others that are NaN")
    case.close(itself, whole[:, one], "a token by itself", scale=size(whole))


@law(
    "head",
    "projection",
    "logits are scale W hidden, softly capped: cap tanh(. / cap); with their gradients",
    kills="head-caps-before-it-scales",
    claimed=True,
    examples=25,
)
def projection(case: Case) -> None:
    rows, tokens = case.integer("rows", 1, 2), case.integer("tokens", 1, 4)
    x = case.stream("x", rows, tokens) * 2.0 ** case.integer("power", -3, 5)
    (name,) = case.node.linears
    scale, cap = getattr(case.config, "scale", 1.0), getattr(case.config, "cap", None)
    case.settle(lambda model, y: read(case, model, y), x)
    linear: Any = case.part.get_submodule(name)
    matrix = linear.matrix().detach().double().requires_grad_()
    plain = x.double().requires_grad_()
    logits = scale * plain @ matrix.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    cotangent = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
    wanted = torch.autograd.grad(logits, (plain, matrix), cotangent)
    found = case.gradients(case.model, lambda y: read(case, case.model, y), x)
    case.close(found["output"], logits, "the logits")
    if cap is not None:
        case.require(size(found["output"]) <= cap, f"a logit is {size(found['output'])}, above the cap {cap}")
    (gradient,) = (each for at, each in found.items() if at not in ("input", "output"))
    told = {"input": wanted[0], "matrix": wanted[1]}
    case.close({"input": found["input"], "matrix": gradient}, told, "gradients", terms=rows * tokens)


@law(
    "head",
    "tied",
    "a tied head and the embedding are one parameter, counted once, whose gradient is the sum of both ends'",
    kills="head-tied-to-nothing",
    examples=10,
)
def tied(case: Case) -> None:
    try:
        spec, apart = (setting(case, tie) for tie in (True, False))
    except SpecError:  # a head may refuse to be tied
        return
    model, other = case.built(spec), case.built(apart)
    aliases = {name: whole for name, whole in spec.plan.aliases.items() if name.startswith("head.")}
    case.require(aliases, "a tied head has no tensor that is the embedding's")
    names = dict(model.named_parameters(remove_duplicate=False))
    for alias, whole in aliases.items():
        case.require(names[alias] is names[whole], f"{alias} is not {whole}")
    counted = sum(p.numel() for p in other.parameters()) - sum(p.numel() for p in model.parameters())
    case.equal(counted, sum(names[alias].numel() for alias in aliases), "the parameters that tying saves")
    values = model.state_dict()
    other.load_state_dict({name: values[aliases.get(name, name)] for name in other.state_dict()})
    ids = case.ids("ids", case.integer("rows", 1, 2), case.integer("tokens", 1, 5))
    found, wanted = (case.gradients(each, partial(ends, each), ids) for each in (model, other))
    case.close(found["output"], wanted["output"], "logits of a tied and an untied head")
    for alias, whole in aliases.items():
        both = wanted[whole].double(), wanted[alias].double()
        scale = sum(size(each) for each in both)
        case.close(found[whole], sum(both), "the gradient", scale=scale, terms=ids.numel())


def ends(model: Model, ids: Tensor) -> Tensor:
    """The head over the embeddings, with nothing between them."""
    logits: Tensor = model.head(model.embedding(ids).to(model.activations))
    return logits


def setting(case: Case, tie: bool) -> Spec:
    """The case's spec, its ends tied or not."""
    data = {**case.data, "model": {**case.data["model"], "tie_embeddings": tie}}
    return in_dtype(case.spec_of(data), case.spec.formats.activations)
