"""From a spec to what trains its model: the objective and the optimizer that it names."""

from typing import Any

from torch.optim import Optimizer

from composeformer import lazy
from composeformer.contracts import Facts, Linear, Part
from composeformer.decoder import Model
from composeformer.errors import InputError, Problem, SpecError
from composeformer.site import Site
from composeformer.spec import Spec
from composeformer.spec.resolve import place
from composeformer.spec.scanner import dotted
from composeformer.train.after import path_of
from composeformer.train.roles import MakeOptimizer, Objective, Trained


def trainer(model: Model, spec: Spec | None = None) -> tuple[Objective, Optimizer]:
    """The objective and the optimizer of `spec`, by default the model's own, over the model's parameters.

    Raises SpecError where the spec has none, an implementation that was asked for can not serve, or the model's
    precision stores weights as codes.
    """
    spec = model.spec if spec is None else spec
    refuse_codes(model.spec)
    objective, optimizer = spec.single("objective"), spec.single("optimizer")
    made: Objective = _load(objective, model, spec)(objective.config)
    make: MakeOptimizer = _load(optimizer, model, spec)
    return made, make(optimizer.config, trained(model), spec.train.learning_rate)


def refuse_codes(spec: Spec) -> None:
    """Raises SpecError where a precision policy stores weights as codes, which do not train."""
    formats = spec.formats
    if not formats.coded:
        return
    first, *others = formats.coded
    policy = formats.decides(first.rpartition(".")[0])
    default = spec.registry.default("precision")
    plain = "" if default is None else f", such as {default.kind}"
    named = f"{first} and {len(others)} more weights are" if others else f"{first} is"
    told = f"{named} stored as codes, which do not train; train under a precision that stores weights plainly{plain}"
    path = place(spec.document, policy.paths, "kind")
    raise SpecError([Problem(dotted(path), policy.kind, told, None, spec.document.source(path))])


def trained(model: Model) -> list[Trained]:
    """Every parameter that trains, once, with what its part declared, in the order of the plan.

    Raises InputError for a parameter that no part of the model declared.
    """
    plan = model.spec.plan
    linears: dict[str, Linear] = {}
    for role, linear in plan.linears.items():
        linears |= {f"{role}.weight": linear, f"{role}.bias": linear}
    # An alias is another name of a parameter that the plan has by its own.
    names = {
        path_of(name): p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    found = [
        Trained(name, names[name], weight, linears.get(name), model.spec.formats.tensors[name])
        for name, weight in plan.tensors.items()
        if name in names
    ]
    known = {id(one.parameter) for one in found}
    stray = [name for name, parameter in names.items() if id(parameter) not in known]
    if stray:
        raise InputError(f"{stray[0]}: no part of the model declares this parameter")
    return found


def _load(part: Part, model: Model, spec: Spec) -> Any:
    """What the part's implementation names: the one asked for, or the first that serves."""
    site = Site(path=part.slot, slot=part.slot, layer=None, width=spec.model.hidden_size, spec=spec)
    facts = Facts(
        config=part.config,
        site=site,
        phase="train",
        device=model.device.type,
        dtype=str(model.activations).removeprefix("torch."),
    )
    wanted = part.chosen("train")
    reasons = {}
    for offered in part.component.implementations:
        if "train" not in offered.phases or wanted not in ("auto", offered.name):
            continue
        reason = offered.needs(facts) if offered.needs is not None else None
        if reason is None:
            return lazy.load(offered.module)
        reasons[offered.name] = reason
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise SpecError([Problem(part.slot, part.kind, f"no implementation serves here: {why}")])
