"""Laws of every part that is called with tensors: it computes what its reference does, and is what its config says.

Shapes: B rows, T tokens, D features.
"""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from composeformer.assemble import build
from composeformer.contracts import Core
from composeformer.costs.counts import stated
from composeformer.decoder import Model
from composeformer.errors import SpecError
from composeformer.tensors import DTYPES
from composeformer.testing.bounds import roundoff, terms_of
from composeformer.testing.calling import call, choices, entered, entering, uncalled
from composeformer.testing.case import Case
from composeformer.testing.law import EVERYWHERE, law
from composeformer.testing.subject import Subject


@law(
    EVERYWHERE,
    "reference",
    "outputs and gradients are those of the reference in float64, in every phase; a reference's, of the others",
    kills="absorbed-without-the-scale",
    applies=uncalled,
    examples=12,
)
def reference(case: Case) -> None:
    roots = entered(case)
    chosen = any(node.slot == "router" for root in roots for node in root.walk())
    if chosen and roundoff(case.dtype) > roundoff(torch.float32):
        case.draw.reject("rounding may choose other experts")
    x = entering(case)
    case.settle(lambda model, y: call(case, model, y), x)
    exact = x.double() if x.is_floating_point() else x
    wanted = case.gradients(case.judge, lambda y: call(case, case.judge, y), exact)
    whole = terms_of(*roots)
    case.unturned(lambda model, y: call(case, model, y), x, whole)
    more: dict[str, Any] = {"terms": whole.terms + x.shape[0] * x.shape[1], "stages": whole.stages}
    for name, model in _served(case).items():
        phases = case.subject.implementation.phases if model is case.model else ("train",)
        for phase in phases:
            found = case.gradients(model, lambda y, m=model, p=phase: call(case, m, y, p), x)  # type: ignore[misc]
            case.close(found, wanted, f"{name} in {phase}, beside the reference", **more)


def _served(case: Case) -> dict[str, Model]:
    """The case's model; for a reference, the same by each of the other implementations that serve there."""
    models = {case.subject.implementation.name: case.model}
    if case.subject.implementation.name != "reference":
        return models
    (path, *_) = case.node.part.paths
    for other in case.subject.component.implementations:
        if other.name == "reference" or "train" not in other.phases:
            continue
        changes = {".".join(map(str, (*path, "implementation"))): {"train": other.name}}
        try:
            model = case.built(case.spec.with_(changes))
        except SpecError:
            continue
        model.load_state_dict(case.model.state_dict())
        models[other.name] = model
    return models


@law(
    EVERYWHERE,
    "declared",
    "what is built is what was declared: names, shapes, dtypes, what trains",
    kills="norm-weight-in-another-dtype",
    applies=uncalled,
    examples=6,
)
def declared(case: Case) -> None:
    formats = case.spec.formats
    for model in (case.model, build(case.spec, device="meta")):
        built = model.state_dict(keep_vars=True)
        case.equal(sorted(built), sorted({**formats.stored, **formats.aliases}), "names of tensors")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        for name, weight in formats.stored.items():
            found = built[name]
            case.equal(tuple(found.shape), weight.shape, f"shape of {name}")
            case.equal(found.dtype, DTYPES[str(weight.dtype)], f"dtype of {name}")
            case.equal(name in trained, weight.trains, f"whether {name} trains")
    size = sum(p.numel() for p in case.model.parameters())
    counted = sum(weight.elements for weight in formats.stored.values() if weight.trains)
    case.equal(size, counted, "the number of parameters")


def _flops_apply(subject: Subject) -> str | None:
    if subject.implementation.name != "reference":
        return "only plain products can be counted, and those are the reference's"
    if subject.slot == "predictor":
        return "what a predictor runs again is counted in whole models"
    return uncalled(subject)


@law(
    EVERYWHERE,
    "flops",
    "declared products are those that PyTorch counts, with a full mask; of a constant core, and of experts that a "
    "token might choose and does not, at most",
    kills="core-counts-one-product",
    applies=_flops_apply,
    examples=6,
)
def flops(case: Case) -> None:
    x = entering(case)
    tokens = x.shape[1]
    linears, least, most = 0.0, 0.0, 0.0
    nodes = [each for root in entered(case) for each in root.walk()]
    for node in nodes:
        linears += sum(linear.flops for linear in node.linears.values())
        for core in (each for each in stated(node, "train") if isinstance(each, Core)):
            if core.window is not None and core.window < tokens:
                case.draw.reject("a window is narrower than the mask")
            most += core.flops(tokens, causal=False)
            least += core.flops(tokens, causal=False) - core.constant
    with torch.no_grad(), FlopCounterMode(display=False) as counter, choices(case.judge) as nobody:
        call(case, case.judge, x.double() if x.is_floating_point() else x)
    if any(nobody):  # who chooses fewer experts takes fewer products
        stacks = [linear for node in nodes for linear in node.linears.values() if linear.groups is not None]
        least -= sum(linear.flops for linear in stacks)
    found = counter.get_total_flops() / x.shape[0] / tokens
    told = f"a token of {tokens} takes {found:g} operations; declared are {linears + least:g}"
    if most > least:
        told += f", and at most {most - least:g} more"
    case.require(linears + least <= found <= linears + most, told)
