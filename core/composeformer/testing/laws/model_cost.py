"""Laws of whole models on paper: what a spec declares without torch is what is built, counted and written."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import composeformer as cf
from composeformer.assemble import build, in_dtype, skeleton
from composeformer.contracts import Core, Uses
from composeformer.costs import checkpoint, cost
from composeformer.costs.counts import stated
from composeformer.decoder import Model
from composeformer.formats import BITS
from composeformer.plan import Node
from composeformer.tensors import DTYPES
from composeformer.testing.calling import choices
from composeformer.testing.case import without_choices
from composeformer.testing.models import ModelCase, model_law

# A single token's products are no matrix products, which is all that PyTorch counts.
LEAST = 4


@model_law(
    "built",
    "declared tensors are what is built: names, shapes, dtypes, what trains, what is shared; all have finite values",
    kills="the-predictor-is-left-unwritten",
    examples=8,
)
def built(case: ModelCase) -> None:
    stored, plan = case.spec.formats.stored, case.spec.plan
    for model in (case.model, skeleton(case.spec, device="meta")):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        state = model.state_dict(keep_vars=True)
        case.equal({*state}, {*stored, *case.spec.formats.aliases}, "the names of tensors")
        for name, weight in stored.items():
            each = state[name]
            case.equal(tuple(each.shape), tuple(weight.shape), f"the shape of {name}")
            case.equal(each.dtype, DTYPES[str(weight.dtype)], f"the dtype of {name}")
            case.equal(
                isinstance(each, nn.Parameter) and each.requires_grad, weight.trains, f"whether {name} trains"
            )
            case.equal(name in parameters, weight.trains, f"whether {name} is a parameter")
        for name, target in plan.aliases.items():
            case.require(state[name] is state[target], f"{name} is another tensor than {target}")
    for name, each in build(case.spec, seed=0).state_dict().items():
        case.finite(each, f"the initial {name}")


@model_law(
    "counted",
    "declared counts are those of the tensors that are built, by slot, of the predictor, and of buffers",
    kills="a-tied-matrix-counts-twice",
    examples=40,
)
def counted(case: ModelCase) -> None:
    counts, model = cost(case.spec), case.model
    predictor = 0 if model.predictor is None else _unique(model.predictor)
    every = _unique(model)
    case.equal(counts.total, every - predictor, "total")
    case.equal(counts.predictor, predictor, "predictor")
    case.equal(sum(counts.by_slot.values()), counts.total, "the sum of by_slot")
    main = [node for node in case.spec.plan.nodes() if not _below(node.path, "predictor")]
    own: Counter[str] = Counter()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: set[int] = set()
    for node in main:
        for name, _ in node.tensors():
            parameter = parameters.get(name)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                own[node.slot] += parameter.numel()
    case.equal(dict(counts.by_slot), {slot: number for slot, number in own.items() if number}, "by_slot")
    buffers = sum(b.numel() for name, b in model.named_buffers() if not _below(name, "predictor"))
    case.equal(sum(counts.buffers.values()), buffers, "buffers")


def _unique(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}.")


@model_law(
    "active",
    "one token's gradient reaches the parameters that are declared active, and of stacked maps no more groups",
    kills="every-expert-is-active",
    examples=10,
)
def active(case: ModelCase) -> None:
    """Those of maps in groups are counted by the groups that a token's gradient reaches, the others whole."""
    model = case.fresh()
    ids = case.ids("ids", 1, 1)
    output = model(ids, predict=False)
    ramp = torch.linspace(0.5, 1.5, output.logits.numel(), dtype=torch.float64)
    torch.autograd.backward(output.logits, ramp.view(output.logits.shape))
    idle = 0
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for role, linear in case.spec.plan.linears.items():
        if linear.groups is None or _below(role, "predictor"):
            continue
        for weight in linear.weights:
            found = gradients.get(f"{role}.{weight.name.rpartition('.')[2]}")
            reached = 0 if found is None else int(found.flatten(1).any(1).sum())
            told = f"{role}: groups that a token reaches"
            case.require(
                reached <= linear.active_groups, f"{told}: {reached}, declared {linear.active_groups}"
            )
            idle += (linear.groups - linear.active_groups) * (weight.elements // linear.groups)
    counts = cost(case.spec).active
    predictor = 0 if model.predictor is None else _unique(model.predictor)
    every = _unique(model) - predictor
    case.equal(counts.with_embeddings, every - idle, "active with embeddings")
    shared = bool(case.spec.plan.aliases)
    table, head = _unique(model.embedding), 0 if shared else _unique(model.head)
    case.equal(
        counts.without_input_embedding, every - idle - (0 if shared else table), "active without the input"
    )
    case.equal(counts.without_embeddings, every - idle - table - head, "active without embeddings")


@model_law(
    "operations",
    "declared operations are those that a forward of the references counts with a full mask, predictions too; constant "
    "ones, and those of experts that a token might choose and does not, at most",
    kills="predictions-use-no-head",
    examples=8,
)
def operations(case: ModelCase) -> None:
    """A predictor's depth k computes its parts and what it uses for the tokens that have k after them."""
    spec = in_dtype(case.spec_of(without_choices(case.data)), "float64")
    model, tokens = build(spec, device="cpu"), case.integer("tokens", LEAST, 9)
    ids = case.ids("ids", 2, tokens)
    plan = spec.plan
    main = [node for node in plan.nodes() if not _below(node.path, "predictor")]
    told = sum(tokens * operations_of(node, tokens) for node in main)
    without, nobody = _counted(model, ids, False)
    loose = sum(tokens * _at_most(node, nobody) for node in main)
    _between(case, without / 2, told, loose, f"operations of {tokens} tokens")
    by_cost = cost(spec, context=tokens, causal=False).flops_per_token.forward
    routers = sum(linear.flops for node in main if node.slot == "router" for linear in node.linears.values())
    windows = sum(_windowed(node, tokens) for node in main)
    case.equal(by_cost + routers + windows, told / tokens, "what cost declares for a token")
    if plan.predictor is None:
        return
    depth = plan.predictor.part.config.depth if hasattr(plan.predictor.part.config, "depth") else None
    if depth is None or depth > tokens - LEAST:
        return
    ends = {"embedding": plan.embedding, "head": plan.head}
    found, nobody = _counted(model, ids, True)
    wanted = loose = 0.0
    for k in range(depth):
        left = tokens - k - 1
        for node in plan.predictor.walk():
            wanted += left * operations_of(node, left)
            loose += left * _at_most(node, nobody)
            for use in stated(node, "train"):
                if isinstance(use, Uses):
                    used = [*ends[use.slot].walk()]
                    wanted += left * use.times * sum(operations_of(each, left) for each in used)
                    loose += left * use.times * sum(_at_most(each, nobody) for each in used)
    # What is declared is that of all depths, each of which has other tokens.
    more = (found - without) / 2 * depth
    _between(case, more, wanted, loose, f"operations of predictions of {tokens} tokens, times their depths")


def _between(case: ModelCase, found: float, most: float, loose: float, told: str) -> None:
    """All that is declared, or less by what is declared as the most."""
    if not loose:
        case.equal(found, most, told)
    case.require(
        most - loose <= found <= most, f"{told}: {found:g}, must be from {most - loose:g} to {most:g}"
    )


def operations_of(node: Node, tokens: int) -> float:
    """The operations of a part alone for one of `tokens` tokens, whatever its windows: all that is multiplied."""
    cores = [attrs.evolve(each, window=None) for each in stated(node, "train") if isinstance(each, Core)]
    return sum(linear.flops for linear in node.linears.values()) + sum(c.flops(tokens, False) for c in cores)


def _at_most(node: Node, nobody: bool) -> float:
    """Of those, what may be less: constants, of operations of any sort, and experts where a token chose fewer."""
    stacks = [each for each in node.linears.values() if each.groups is not None and nobody]
    cores = [each.constant for each in stated(node, "train") if isinstance(each, Core)]
    return sum(cores) + sum(each.flops for each in stacks)


def _windowed(node: Node, tokens: int) -> float:
    """Of those, what a window leaves out by declaration; the references compute it and throw it away."""
    cores = [each for each in stated(node, "train") if isinstance(each, Core)]
    return sum(attrs.evolve(c, window=None).flops(tokens, False) - c.flops(tokens, False) for c in cores)


def _counted(model: Model, ids: torch.Tensor, predict: bool) -> tuple[float, bool]:
    """The operations of a forward, and whether some token chose no expert where it might."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, choices(model) as nobody:
        model(ids, predict=predict)
    return float(counter.get_total_flops()), any(nobody)


@model_law(
    "written",
    "a folder has the tensors, elements and bytes that are declared, in files that its index knows",
    kills="a-saved-bias-is-zero",
    examples=12,
)
def written(case: ModelCase) -> None:
    told = checkpoint(case.spec)
    found: Counter[str] = Counter()
    tensors = 0
    with tempfile.TemporaryDirectory() as folder:
        name = cf.save(case.model, Path(folder) / "model")
        for path in sorted((Path(folder) / "model").glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    each: Any = file.get_tensor(key)
                    tensors += 1
                    found[str(each.dtype).removeprefix("torch.")] += each.numel()
        read = cf.load(Path(folder) / "model")
    case.equal(name, told.dialect, "the dialect")
    case.equal((tensors, found.total()), (told.tensors, told.elements), "tensors and elements")
    case.equal(dict(found), dict(told.by_dtype), "elements by dtype")
    case.equal(sum(n * BITS[dtype] // 8 for dtype, n in found.items()), told.bytes, "bytes")
    case.same(read.state_dict(), case.model.state_dict(), "what was read")
    case.equal(read.spec, case.spec, "the spec that was read")
    case.equal(read.spec.fingerprint, case.spec.fingerprint, "the fingerprint that was read")
    batch = case.batch
    case.same(case.results(read, batch), case.results(case.model, batch), "the model that was read")
