"""Laws that predictors claim which are sequences of depths, as DeepSeek-V3's (arXiv 2412.19437, section 2.2).

Each depth joins a hidden state with the embedding of the token k places on, and is read by the model's own head.

Shapes: B rows, T tokens, D hidden size.
"""

import re
from typing import Any

import torch
from torch import Tensor

from composeformer.contracts import Linear
from composeformer.decoder import Model
from composeformer.testing.bounds import size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.predictor import predicted, settled
from composeformer.testing.variants import variant


def each_depth(
    case: Case, model: Model, hidden: Tensor, ids: Tensor, stream: Tensor | None = None
) -> list[Tensor]:
    """The logits of each depth from hidden states (B, T, D) and tokens (B, T)."""
    part: Any = case.part_of(model)
    return [p.logits for p in part(hidden if stream is None else stream, hidden, model.batch(ids))]


def from_hidden(
    case: Case, model: Model, hidden: Tensor, ids: Tensor, stream: Tensor | None = None
) -> Tensor:
    """All of them (N, V)."""
    return torch.cat([each.flatten(0, 1) for each in each_depth(case, model, hidden, ids, stream)])


@law(
    "predictor",
    "own-head",
    "each depth's logits are the model's own head over its hidden states, and learn through it",
    kills="predictor-keeps-a-head-of-its-own",
    claimed=True,
    examples=5,
)
def own_head(case: Case) -> None:
    ids = settled(case, 1)
    head = dict(case.model.head.named_parameters(prefix="head"))
    with torch.no_grad():
        predicted(case.model, ids)
        for name, parameter in head.items():
            parameter.add_(case.normal(name, *parameter.shape, dtype=parameter.dtype))
    for k, each in enumerate(predicted(case.model, ids).predictions, 1):
        hidden = each.hidden.detach()
        wanted = case.model.head(hidden)
        case.close(each.logits, wanted, f"depth {k}")
        cotangent = torch.linspace(-1, 1, wanted.numel()).view(wanted.shape).to(wanted.dtype)
        learnt = torch.autograd.grad(wanted, list(head.values()), cotangent)
        # With the hidden states held, what is left of a gradient came through the head; a tied one has other ways.
        if not case.spec.plan.aliases:
            reached = list(head.values())
            found = torch.autograd.grad(each.logits, reached, cotangent, retain_graph=True, allow_unused=True)
            for name, one, other in zip(head, found, learnt, strict=True):
                case.require(one is not None, f"depth {k} teaches {name} nothing")
                case.close(
                    one, other, f"depth {k}: the gradient of {name}", scale=size(other), terms=ids.numel()
                )


@law(
    "predictor",
    "from-hidden",
    "it reads the hidden states behind the model's last norm, not the stream before it",
    kills="predictor-reads-the-stream",
    claimed=True,
    examples=5,
)
def reads_hidden(case: Case) -> None:
    ids = settled(case, case.integer("rows", 1, 2))
    hidden = case.stream("hidden", *ids.shape)
    other = hidden.flip(-1)
    with torch.no_grad():
        wanted = from_hidden(case, case.model, hidden, ids)
        beside = from_hidden(case, case.model, hidden, ids, other)
        case.equal(beside, wanted, "predictions beside another stream")
        moved = from_hidden(case, case.model, other, ids)
    case.require(bool((moved != wanted).any()), "predictions know nothing of the hidden states")


@law(
    "predictor",
    "embedding-first",
    "what joins a token's embedding (enorm) with a hidden state (hnorm) has the embedding's features first",
    kills="predictor-joins-hidden-first",
    claimed=True,
    examples=6,
)
def embedding_first(case: Case) -> None:
    ids = settled(case, 1)
    width, tokens = case.node.site.width, ids.shape[1]
    changed = case.integer("changed", 1, tokens - 1)
    swapped = ids.clone()
    swapped[:, changed:] = (ids[:, changed:] + 1) % case.spec.model.vocab_size
    hidden = case.stream("hidden", *ids.shape)
    other = hidden.flip(-1)
    with torch.no_grad():
        one, two = (each_depth(case, case.model, hidden, at) for at in (ids, swapped))
        for k, (before, after) in enumerate(zip(one, two, strict=True), 1):
            differs = (before != after).any(-1)[0]
            case.require(not bool(differs[: max(0, changed - k)].any()), f"depth {k} knows a later token")
            if changed >= k:
                told = f"depth {k} at {changed - k} does not know token {changed}"
                case.require(bool(differs[changed - k]), told)
        halves = (
            (slice(width), "embeddings", "hidden states"),
            (slice(width, None), "hidden states", "embeddings"),
        )
        given = {"embeddings": (hidden, swapped), "hidden states": (other, ids)}
        for half, lost, left in halves:
            model = case.built(case.spec)
            for name in joins(case):
                model.get_parameter(f"{case.node.path}.{name}.weight")[:, half] = 0
            wanted = from_hidden(case, model, hidden, ids)
            told = f"predictions without the weights that read {lost}, of other {lost}"
            case.equal(from_hidden(case, model, *given[lost]), wanted, told)
            norms = {"embeddings": "enorm", "hidden states": "hnorm"}
            for name, parameter in model.named_parameters():
                if name.startswith(case.node.path) and norms[lost] in name.split("."):
                    parameter.mul_(2)
            told = f"predictions without the weights that read {lost}, which a norm of another part reaches"
            case.equal(from_hidden(case, model, hidden, ids), wanted, told)
            knows = bool((from_hidden(case, model, *given[left]) != wanted).any())
            case.require(knows, f"without the weights that read {lost} predictions know no {left}")


def joins(case: Case) -> dict[str, Linear]:
    """The linear maps that read twice the hidden size."""
    width = case.node.site.width
    return {name: each for name, each in case.node.linears.items() if each.inputs == 2 * width}


@law(
    "predictor",
    "sequential",
    "depth k + 1 is to what depth k left what depth 1 is to the model",
    kills="predictor-goes-on-before-the-norm",
    claimed=True,
    examples=12,
)
def sequential(case: Case) -> None:
    ids = settled(case, case.integer("rows", 1, 2))
    first = case.built(variant(case, depth=1))
    values = case.model.state_dict()
    with torch.no_grad():
        predictions = predicted(case.model, ids).predictions
        for k in range(1, len(predictions)):
            before, after = predictions[k - 1 : k + 1]
            renamed = {
                name: re.sub(r"^(predictor\.[a-z_]+)\.0\.", rf"\1.{k}.", name) for name in first.state_dict()
            }
            first.load_state_dict({name: values[other] for name, other in renamed.items()})
            part: Any = case.part_of(first)
            (found,) = part(before.hidden, before.hidden, before.batch)
            case.close(
                found.logits, after.logits, f"depth {k + 1}", scale=size(after.logits), terms=ids.shape[1]
            )
            case.close(found.hidden, after.hidden, f"depth {k + 1}: hidden states", scale=size(after.hidden))
