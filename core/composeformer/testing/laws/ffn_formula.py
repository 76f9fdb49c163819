"""Laws that feed-forward networks claim of their formula: y = down(act(gate(x)) * up(x)), of each expert, too.

They know the fields `activation` and `gated` (else silu, and gated) and linear maps named `gate`, `up` and `down`
(arXiv 2002.05202, equation 6).

Shapes: B rows, T tokens, D features, E experts.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from composeformer.config import facts_of
from composeformer.testing.bounds import size
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.laws.ffn import LONGEST, MOST, settled, transform
from composeformer.testing.laws.ffn_routed import by, has_router, router_of
from composeformer.testing.twins import twin

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: torch.where(x > 0, x, 0),
    "relu2": lambda x: torch.where(x > 0, x * x, 0),
}


def affine(case: Case, name: str, x: Tensor, expert: int | None = None) -> Tensor:
    """A map of the part, or of one of its experts, over x in float64. It has a bias if the field `bias` says so."""
    tensors = dict(case.model.named_parameters())
    linear = case.node.linears[name]
    weight, *bias = (tensors[f"{case.node.path}.{each.name}"].detach().double() for each in linear.weights)
    if "bias" in facts_of(type(case.config)):
        case.equal(bool(bias), case.config.bias, f"whether {name} has a bias")
    if expert is not None:
        weight, bias = weight[expert], [each[expert] for each in bias]
    found = x.double() @ weight.T
    return found + bias[0] if bias else found


def gated(case: Case, x: Tensor, expert: int | None = None, whose: str = "", named: str = "") -> Tensor:
    """The formula over x in float64, by maps whose names begin so, with the activation `named`, else the config's."""
    names = facts_of(type(case.config))
    activation = ACTIVATIONS[named or (case.config.activation if "activation" in names else "silu")]
    up = affine(case, f"{whose}up", x, expert)
    plain = "gated" in names and not case.config.gated
    inner = activation(up) if plain else activation(affine(case, f"{whose}gate", x, expert)) * up
    return affine(case, f"{whose}down", inner, expert)


@law(
    "ffn",
    "formula",
    "the output is down(act(gate(x)) * up(x)), or down(act(up(x))) where it is not gated",
    kills="gelu-by-its-approximation",
    claimed=True,
    examples=20,
)
def formula(case: Case) -> None:
    """With each activation that it can have, whatever was drawn."""
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = settled(case, rows, tokens)
    fact = facts_of(type(case.config)).get("activation")
    own = [] if fact is None else [case.config.activation]
    names = [*own, *(each for each in (fact and fact.choices) or () if [each] != own)]
    for name in names or [""]:
        model = case.model if [name] == own or not name else twin(case, case.node, activation=name)
        if model is None:
            continue
        with torch.no_grad():
            found = transform(case, model, x, ids).hidden
        case.close(found, gated(case, x, named=name), f"the formula {name}".rstrip())


@law(
    "ffn",
    "experts-formula",
    "an expert adds down(silu(gate(x)) * up(x)) by its own maps; so does what all tokens share, by its `shared_` maps",
    kills="silu-on-the-other-map",
    claimed=True,
    applies=has_router,
)
def experts_formula(case: Case) -> None:
    """What it adds is the output with it alone, less that with none: which is what is shared."""
    rows, tokens = case.integer("rows", 1, MOST), case.integer("tokens", 1, LONGEST)
    x, ids = settled(case, rows, tokens)
    experts = router_of(case).site.sizes["num_experts"]
    expert = case.integer("expert", 0, experts - 1)
    ones = torch.ones(rows, tokens, 1, dtype=torch.promote_types(case.dtype, torch.float32))
    with torch.no_grad():
        base, found = (by(case, x, ids, torch.full(ones.shape, i), ones).double() for i in (experts, expert))
    case.close(found - base, gated(case, x, expert), f"expert {expert}", scale=size(base) + size(found))
    if "shared_up" in case.node.linears:
        case.close(base, gated(case, x, whose="shared_"), "what is shared")
