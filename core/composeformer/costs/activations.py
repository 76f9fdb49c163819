"""What training keeps of each token for the backward pass, from what parts declare (`contracts.Saved`).

A tensor that several operations read is kept once: it goes by its name and its dtype. What all rows or all layers share
(rotary tables, masks, copies of weights in the dtype that they are multiplied in) is no activation, nor is what a pass
makes and drops. Recomputation (arXiv 2205.05198) keeps less, and makes one layer at a time again in the backward pass:

    selective    results of norms, what sublayers and the head read, and what parts say is cheaply made again: with
                 `mla` what its latents give, with gated networks their products (arXiv 2412.19437, section 3.2.3)
    full         everything of a layer but the stream that it reads; not what is beyond the last layer
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import attrs

from composeformer.blame import blame
from composeformer.contracts import Facts, Saved, Uses
from composeformer.costs.counts import stated
from composeformer.formats import BITS, Format
from composeformer.plan import Node
from composeformer.site import Site
from composeformer.spec import Spec


class Tensor(NamedTuple):
    """One that is kept, and the bytes of it for each token."""

    name: str
    dtype: str
    bytes: float


@attrs.frozen(kw_only=True)
class Training:
    """How a model is trained: tokens of a sequence, processes that share a linear map, what is made again, where."""

    context: int
    tensor: int = 1
    recompute: str = "none"
    device: str = "cuda"


def unknown(nodes: Iterable[Node]) -> tuple[str, ...]:
    """Of these alone, the components that do not say what they keep: they state no `Saved`."""
    silent = {
        f"{node.slot} {node.part.kind}"
        for node in nodes
        if not any(isinstance(each, Saved) for each in stated(node, "train"))
    }
    return tuple(sorted(silent))


def objective(spec: Spec) -> Node:
    """The loss, as a part of its own."""
    part = spec.single("objective")
    site = Site(path="objective", slot="objective", layer=None, width=spec.model.hidden_size, spec=spec)
    return Node(part=part, stated=part, site=site, linears={}, weights={}, children={})


def per_token(nodes: Iterable[Node], how: Training) -> float:
    """Bytes that these parts keep of each token, of one device; each tensor once. What is unknown is not in it."""
    sizes: dict[tuple[str, str], float] = {}
    for node in nodes:
        for tensor in kept(node, how):
            sizes.setdefault((tensor.name, tensor.dtype), tensor.bytes)
    return sum(sizes.values())


def again(node: Node, how: Training) -> float:
    """Bytes that what a part runs again of the model's ends keeps of each token: a prediction has its loss, too."""
    plan = node.site.spec.plan
    ends = {"embedding": plan.embedding, "head": plan.head}
    found = 0.0
    for use in stated(node, "train"):
        if isinstance(use, Uses):
            run = [*ends[use.slot].walk(), *([objective(node.site.spec)] if use.slot == "head" else [])]
            found += use.times * per_token(run, how)
    return found


def kept(node: Node, how: Training) -> Iterator[Tensor]:
    """Every tensor that one part states."""
    implementation: str | None = None
    for saved in stated(node, "train"):
        if not isinstance(saved, Saved) or not _survives(saved, node, how):
            continue
        if saved.implementations:
            implementation = serving(node, how.device) if implementation is None else implementation
            if implementation not in saved.implementations:
                continue
        yield from _tensors(saved, node, how)


def serving(node: Node, device: str) -> str:
    """The implementation that trains a part on a sort of device: the one asked for, or the first that serves."""
    chosen = node.stated.chosen("train")
    if chosen != "auto":
        return chosen
    spec = node.site.spec
    facts = Facts(node.part.config, node.site, "train", device, spec.formats.activations)
    with blame(spec.registry, node.part, node.path, "needs"):
        for offered in node.part.component.implementations:
            if "train" in offered.phases and (offered.needs is None or offered.needs(facts) is None):
                return offered.name
    return "reference"


def _survives(saved: Saved, node: Node, how: Training) -> bool:
    """Whether it is kept under the choice of recomputation."""
    if how.recompute != "selective":
        return saved.recompute in (None, "none")
    return saved.recompute in (None, "selective") and not (saved.name == "input" and _is_made(node))


def _is_made(node: Node) -> bool:
    """Whether a part's input is made by the residual: from the stream, by a norm."""
    top = node.site.reads.rpartition(".")[0]
    return top == "head" or top.endswith((".mixer", ".ffn"))


def _tensors(saved: Saved, node: Node, how: Training) -> Iterator[Tensor]:
    name = node.site.reads if saved.name == "input" else f"{node.path}.{saved.name}"
    formats, rows = node.site.spec.formats, node.site.rows
    seen = set()
    for role in saved.inputs:
        linear = node.linears[role]
        form = _form(node, role)
        # What is quantised to be multiplied is kept as it came.
        dtype = formats.activations if form.block is not None else form.compute
        if dtype not in seen:
            seen.add(dtype)
            share = how.tensor if linear.shard == "in" else 1
            size = rows * linear.inputs * linear.active_groups / share
            yield Tensor(name, dtype, size * BITS[dtype] / 8)
    if saved.output is not None:
        linear = node.linears[saved.output]
        form = _form(node, saved.output)
        dtype = form.compute if linear.sensitive and form.block is None else formats.activations
        share = how.tensor if linear.shard == "out" else 1
        size = rows * linear.outputs * linear.active_groups / share
        yield Tensor(name, dtype, size * BITS[dtype] / 8)
    if saved.elements or saved.per_key:
        dtype = saved.dtype or formats.activations
        if dtype == "float32" and formats.activations == "float64":
            dtype = "float64"
        size = rows * (saved.elements + saved.per_key * how.context) / (how.tensor if saved.shard else 1)
        yield Tensor(name, dtype, size * BITS[dtype] / 8)


def _form(node: Node, name: str) -> Format:
    return node.site.spec.formats.at(f"{node.path}.{node.linears[name].weight.name}")
