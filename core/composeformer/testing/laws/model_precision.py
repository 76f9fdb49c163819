"""Laws of whole models in any number format: every linear map errs by no more than its own role's format declares.

The bound is an inequality for each element: with |a~ - a| <= e_a and |b~ - b| <= e_b,

    |a~ b~ - a b| <= (|a| + e_a)(|b| + e_b) - |a| |b|

and a sum of products adds `Rounding.sums` of the larger product, a result its own rounding.

Shapes: N rows, I inputs, O outputs.
"""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from composeformer.assemble import build, in_dtype
from composeformer.contracts import Linear
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.precision import starred
from composeformer.rounding import FLOATS, Rounding
from composeformer.spec import Spec
from composeformer.tensors import DTYPES
from composeformer.testing.bounds import roundoff
from composeformer.testing.maps import operand_error
from composeformer.testing.models import ModelCase, model_law
from composeformer.testing.tables import tables

# Numbers this far below the normal ones may be flushed to zero.
FLUSHED = 2.0**-126


def formatted(case: ModelCase) -> Spec:
    """The spec in a drawn precision, with rules for some roles."""
    policies = [each for each in case.tried.registry if each.slot == "precision"]
    component = case.choice("policy", range(len(policies)))
    table: dict[str, Any] = dict(case.draw("precision", tables(policies[component])))
    roles = sorted({starred(role) for role in case.spec.plan.linears})
    kinds = sorted(each.kind for each in policies)
    rule = st.fixed_dictionaries({"roles": st.sampled_from(roles), "format": st.sampled_from(kinds)})
    rules = case.draw("rules", st.lists(rule, min_size=1, max_size=2, unique_by=lambda each: each["roles"]))
    try:
        return case.spec_of({**case.data, "precision": table | {"rules": rules}})
    except SpecError as error:
        case.draw.reject(str(error.problems[0]))


@model_law(
    "precisions",
    "in any precision, by any rules, every linear map errs by no more than the format of its role declares",
    kills="every-role-has-the-first-policy",
    examples=12,
)
def precisions(case: ModelCase) -> None:
    spec = formatted(case)
    seed = case.integer("seed of values", 0, 2**16)
    try:
        model = build(spec, seed=seed)
    except SpecError as error:
        case.draw.reject(str(error.problems[0]))
    exact = build(in_dtype(spec, "float64"), seed=seed)
    state = model.state_dict()
    for name, weight in spec.formats.stored.items():
        case.equal(state[name].dtype, DTYPES[str(weight.dtype)], f"the dtype of {name}")
    called = watched(model, spec)
    ids = case.ids("ids", 2, case.integer("tokens", 1, 6))
    with torch.no_grad():
        output = model(ids, predict=model.predictor is not None)
    case.finite(output.logits, "the logits")
    for role, x, offsets, y in called:
        linear = spec.plan.linears[role]
        held(case, role, linear, told(spec, role, linear), model, exact, x, offsets, y)


def told(spec: Spec, role: str, linear: Linear) -> Rounding:
    """What the policy that decides a role declares of its map."""
    formats = spec.formats
    config: Any = formats.decides(role).config
    sensitive = linear.sensitive and formats.rule(role) is None
    found: Rounding = config.rounding(role, linear.weight, sensitive)
    return found


Call = tuple[str, Tensor, Tensor | None, Tensor]


def watched(model: Model, spec: Spec) -> list[Call]:
    """A list that gets every call of a linear map: its role, inputs, groups' ends, outputs."""
    calls: list[Call] = []

    def watch(role: str) -> Any:
        def hook(module: nn.Module, given: Any, named: Any, y: Tensor) -> None:
            offsets = given[1] if len(given) > 1 else named.get("offsets")
            calls.append((role, given[0].detach(), offsets, y.detach()))

        return hook

    for role in spec.plan.linears:
        model.get_submodule(role).register_forward_hook(watch(role), with_kwargs=True)
    return calls


def held(
    case: ModelCase,
    role: str,
    linear: Linear,
    declared: Rounding,
    model: Model,
    exact: Model,
    x: Tensor,
    offsets: Tensor | None,
    y: Tensor,
) -> None:
    """Holds one call to the bound; rows of a stack by their groups."""
    module: Any = model.get_submodule(role)
    own: Tensor = module.weight.detach()
    coded = f"{role}.weight" in model.spec.formats.coded
    true: Any = exact.get_submodule(role)
    weight = (true.weight if coded else own).detach().double()
    bias = None if module.bias is None else module.bias.detach().double()
    rows, outputs = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    if offsets is None:
        groups = [(slice(None), weight, bias)]
    else:
        stops = offsets.tolist()
        groups = [
            (slice(start, stop), weight[n], None if bias is None else bias[n])
            for n, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))
        ]
    for span, matrix, shift in groups:
        wanted, bound = bounded(declared, rows[span], matrix, shift, y.dtype)
        error = (outputs[span] - wanted).abs()
        if error.numel():
            at = int((error / bound).argmax())
            case.within(float(error.flatten()[at]), float(bound.flatten()[at]), role)


def bounded(
    declared: Rounding, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A product (N, O) in float64, and how far another may be from each of its elements."""
    wanted, size = x @ weight.mT, x.abs() @ weight.abs().mT
    moved = x.abs() + operand_error(x, declared.activation)
    larger = moved @ (weight.abs() + operand_error(weight, declared.weight)).mT
    terms = x.shape[-1]
    bound = larger - size + declared.sums(terms) * larger
    if bias is not None:
        wanted, larger = wanted + bias, larger + bias.abs()
        bound = bound + FLOATS["float32"][0] * larger
    bound = bound + (declared.result + roundoff(dtype)) * (larger + bound)
    # Below its normal numbers a dtype's stand evenly.
    bound = bound + roundoff(dtype) * torch.finfo(dtype).tiny
    # The judge sums in float64 itself.
    return wanted, bound + terms * FLOATS["float64"][0] * larger + FLUSHED
