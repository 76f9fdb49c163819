"""Laws of whole models: one function, however it is computed. Every implementation of every part in every phase,
layers that are computed twice, copies, and the same once more.

Shapes: B rows, T tokens.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from composeformer.assemble import build, in_dtype
from composeformer.contracts import PHASES, Component, Facts, Phase
from composeformer.decoder import Model
from composeformer.implementations import PHASED
from composeformer.spec import Spec
from composeformer.tensors import DTYPES
from composeformer.testing.case import without_choices
from composeformer.testing.laws.model_rows import whole
from composeformer.testing.models import ModelCase, model_law
from composeformer.train import TokenBatch

# Those that implementations serve, of which the first is what all else is computed in.
WIDE = ("float64", "float32")


def able(spec: Spec, dtype: str) -> dict[Component, dict[Phase, list[str]]]:
    """The implementations of each component that serve everywhere in the model, by phase."""
    found: dict[Component, dict[Phase, list[str]]] = {}
    for node in spec.plan.nodes():
        ways = found.setdefault(
            node.part.component,
            {p: [i.name for i in node.part.component.implementations if p in i.phases] for p in PHASES},
        )
        for each in node.part.component.implementations:
            for phase in PHASES:
                facts = Facts(config=node.part.config, site=node.site, phase=phase, device="cpu", dtype=dtype)
                if each.name in ways[phase] and each.needs is not None and each.needs(facts) is not None:
                    ways[phase].remove(each.name)
    return found


def chosen(case: ModelCase, dtype: str) -> dict[tuple[str, str], Any]:
    """An implementation for each component, or one for each phase, by slot and kind."""
    found: dict[tuple[str, str], Any] = {}
    for component, ways in able(case.spec, dtype).items():
        label = f"implementation of {component.slot} {component.kind}"
        if component.slot in PHASED:
            found[component.slot, component.kind] = {
                phase: case.choice(f"{label} in {phase}", ways[phase]) for phase in PHASES
            }
        else:
            every = [name for name in ways["train"] if all(name in ways[p] for p in PHASES)]
            found[component.slot, component.kind] = case.choice(label, every)
    return found


def implemented(data: Any, ways: Mapping[tuple[str, str], Any], kinds: Mapping[str, tuple[str, ...]]) -> Any:
    """The same data with these implementations in every table of those kinds, and none elsewhere."""
    if isinstance(data, Mapping):
        found = {key: implemented(each, ways, kinds) for key, each in data.items() if key != "implementation"}
        for slot, kind in ways:
            if data.get("kind") == kind and kind in kinds[slot]:
                found["implementation"] = ways[slot, kind]
        return found
    return [implemented(each, ways, kinds) for each in data] if isinstance(data, list) else data


@model_law(
    "implementations",
    "every implementation of every part, in every phase, computes what the references do",
    kills="absorbed-scales-by-latents",
    examples=15,
)
def implementations(case: ModelCase) -> None:
    dtype = case.choice("dtype", WIDE)
    ways = chosen(case, dtype)
    names = {slot: case.tried.registry.kinds(slot) for slot, _ in ways}
    other = build(in_dtype(case.spec_of(implemented(case.data, ways, names)), dtype), seed=0)
    plain = case.spec_of(without_choices(case.data))
    judge = build(in_dtype(plain, "float64"), seed=0)
    # The values of the narrower one, so that both compute with the same.
    state = other.state_dict()
    other.load_state_dict(
        {name: each.to(state[name].dtype) for name, each in case.model.state_dict().items()}
    )
    judge.load_state_dict({name: each.to(state[name].dtype) for name, each in other.state_dict().items()})
    batch = case.batch
    step = case.error_in(DTYPES[dtype])

    def run(model: Model) -> dict[str, Tensor]:
        return whole(case, model, batch)

    wanted = case.measure(run, judge, step)
    case.agree(run(other), wanted, "trained", dtype=DTYPES[dtype])
    with torch.no_grad():
        decoded = piecewise(other, batch, case.integer("prompt", 1, batch.ids.shape[1]))
    logits = {"logits": decoded if batch.valid is None else decoded[batch.valid]}
    logits = {"logits": logits["logits"].flatten(0, -2)}
    case.agree(logits, wanted.only("logits"), "prefilled and decoded", dtype=DTYPES[dtype])


def piecewise(model: Model, batch: TokenBatch, prompt: int) -> Tensor:
    """Logits (B, T, V) through a cache: of a prompt, and token by token."""
    ids, valid, documents, _ = batch
    cache = model.new_cache(*ids.shape)
    found = []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        told = {
            name: None if each is None else each[:, start:stop]
            for name, each in (("valid", valid), ("documents", documents))
        }
        found.append(model(ids[:, start:stop], cache=cache, **told).logits)
    return torch.cat(found, 1)


def again(model: Model, place: str) -> None:
    """Makes a copy's layers, or their parts, compute their forward twice: once more in the backward pass."""
    layers: list[Any] = [*model.layers, *(() if model.predictor is None else (model.predictor,))]
    for layer in layers:
        owners = (layer,) if place == "layer" else (getattr(layer, place, None),)
        for owner in owners:
            if owner is not None:
                owner.forward = _twice(owner.forward)


def _twice(once: Any) -> Any:
    return lambda *args: checkpoint(once, *args, use_reentrant=False)


@model_law(
    "recomputed",
    "activations that are computed again in the backward pass change nothing, counts included",
    kills="load-is-kept-by-the-forward",
    examples=32,
)
def recomputed(case: ModelCase) -> None:
    batch = case.batch
    wanted = case.measured("whole", lambda model: whole(case, model, batch))
    model = copy.deepcopy(case.model)
    again(model, case.choice("place", ["layer", "mixer", "ffn"]))
    case.agree(whole(case, model, batch), wanted, "recomputed")
    case.same(stepped(model, wanted.values), stepped(case.fresh(), wanted.values), "after the step")


def stepped(model: Model, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers after the work that parts do after a step with these counts."""
    from composeformer.train import Run
    from composeformer.train.after import after_step

    integers = {name: each for name, each in counts.items() if each.dtype == torch.int64}
    after_step(model, integers, Run(step=0, tokens=1, path="", config=None))
    return {name: each.clone() for name, each in model.named_buffers()}


@model_law(
    "copied",
    "a copy computes the same bits, and nothing done to it reaches the model",
    kills="a-copy-computes-with-the-original",
    examples=5,
)
def copied(case: ModelCase) -> None:
    batch = case.batch
    before = whole(case, case.model, batch)
    other = copy.deepcopy(case.model)
    case.same(whole(case, other, batch), before, "the copy")
    with torch.no_grad():
        for each in other.parameters():
            each.fill_(torch.nan)
    case.same(whole(case, case.model, batch), before, "the model, its copy spoilt")
    with torch.no_grad():
        logits = piecewise(other, batch, 1)
    case.require(logits.isnan().all(), "a copy computes with the model's own weights")


@model_law(
    "repeated",
    "the same once more is the same bits; the same seed the same weights, no two of them alike; no global random state",
    kills="values-from-the-global-random-state",
    examples=5,
)
def repeated(case: ModelCase) -> None:
    state = torch.random.get_rng_state()
    model, batch = case.model, case.batch
    first = whole(case, model, batch)
    case.same(whole(case, model, batch), first, "once more")
    model.eval()
    try:
        evaluated = whole(case, model, batch)
    finally:
        model.train()
    case.same(evaluated, first, "in evaluation mode")
    case.equal(torch.random.get_rng_state(), state, "the global random state")
    seed = case.integer("other seed", 0, 2**16)
    one, same = build(case.spec, seed=seed), build(case.spec, seed=seed)
    case.same(one.state_dict(), same.state_dict(), "two models of one seed")
    other = build(case.spec, seed=seed + 1).state_dict()
    drawn = [
        name for name, each in one.state_dict().items() if each.numel() > 1 and each.unique().numel() > 1
    ]
    values = one.state_dict()
    stale = [name for name in drawn if torch.equal(other[name], values[name])]
    case.require(not stale, f"{stale[:1]} has the same values whatever the seed")
    alike: dict[Any, str] = {}
    for name in drawn:
        if name in case.spec.plan.aliases:
            continue
        for n, each in enumerate(values[name] if values[name].ndim > 2 else [values[name]]):
            if each.numel() > 1:
                twin = alike.setdefault(tuple(each.flatten().tolist()), f"{name} {n}")
                case.equal(f"{name} {n}", twin, "the first of the initial values that are its own")
