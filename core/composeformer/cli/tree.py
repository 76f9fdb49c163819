"""A model's component tree for the terminal and for `--json`: runs of equal layers are shown once."""

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from composeformer.cli.options import plural
from composeformer.config import facts_of, plain
from composeformer.contracts import PHASES, LayerParts, Part
from composeformer.costs.counts import parameters
from composeformer.plan import Node
from composeformer.spec import Spec

Choices = Mapping[str, Mapping[Any, str]]


@attrs.frozen
class Run:
    """Consecutive equal layers, `first` to `last`."""

    first: int
    last: int
    nodes: Mapping[str, Node]

    @property
    def count(self) -> int:
        return self.last - self.first + 1

    @property
    def title(self) -> str:
        return (
            f"layer {self.first}"
            if self.count == 1
            else f"layers {self.first} to {self.last} ({self.count} times)"
        )


def runs(spec: Spec) -> Iterator[Run]:
    """The layers of a spec, equal neighbours together."""
    layers = spec.plan.layers
    first = 0
    for index in range(1, len(layers) + 1):
        if index == len(layers) or spec.layers[index] != spec.layers[first]:
            yield Run(first, index - 1, layers[first])
            first = index


def describe(part: Part) -> str:
    """A part's values that are not defaults: `num_heads 9, head_dim 64`."""
    shown = []
    for name, facts in facts_of(type(part.config)).items():
        value = getattr(part.config, name)
        if isinstance(value, Part):
            shown.append(f"{name} {_called(value)}")
        elif isinstance(value, LayerParts):
            shown.append(f"{name} {' and '.join(_called(held) for _, held in value.items())}")
        elif facts.required or value != facts.default:
            shown.append(f"{name} {str(value).lower() if isinstance(value, bool) else value}")
    return ", ".join(shown)


def _called(part: Part) -> str:
    return part.name if part.name != part.slot else part.kind


def rich_tree(spec: Spec, choices: Choices | None = None) -> Any:
    """The tree for the terminal; `choices` adds the implementation that serves each part."""
    from rich.markup import escape
    from rich.tree import Tree

    def add(tree: Any, node: Node, title: str) -> None:
        own = sum(parameters(below) for below in node.walk())
        shared = [w.same_as for _, w in node.tensors() if w.same_as is not None]
        count = f"{own:,}" if own or not shared else f"shares {shared[0]}"
        text = f"[bold]{title}[/] {node.part.kind} [dim]{escape(describe(node.part))}[/] [green]{count}[/]"
        branch = tree.add(text + _implementations(node, choices))
        for name, child in node.children.items():
            add(branch, child, name)

    plan = spec.plan
    every = sum(weight.elements for weight in plan.tensors.values() if weight.trains)
    further = sum(parameters(node) for node in plan.predictor.walk()) if plan.predictor is not None else 0
    beside = f" and {further:,} in the predictor" if further else ""
    tree = Tree(
        f"[bold]{escape(spec.name)}[/] {every - further:,} parameters{beside}, {plural(len(spec.layers), 'layer')}, "
        f"fingerprint {spec.fingerprint[:12]}"
    )
    add(tree, plan.embedding, "embedding")
    for run in runs(spec):
        branch = tree.add(run.title)
        for slot, node in run.nodes.items():
            add(branch, node, slot)
    add(tree, plan.residual, "residual")
    add(tree, plan.head, "head")
    if plan.predictor is not None:
        add(tree, plan.predictor, "predictor")
    return tree


def _implementations(node: Node, choices: Choices | None) -> str:
    offered = [i.name for i in node.part.component.implementations]
    if choices is not None and node.path in choices:
        names = list(dict.fromkeys(choices[node.path].values()))
        return f" [cyan]{' / '.join(names)}[/]" if len(offered) > 1 else ""
    asked = dict.fromkeys(node.stated.chosen(phase) for phase in PHASES)
    return f" [cyan]{' / '.join(asked)} of {', '.join(offered)}[/]" if len(offered) > 1 else ""


def json_tree(spec: Spec, choices: Choices | None = None) -> dict[str, Any]:
    """The same as plain data."""

    def of(node: Node) -> dict[str, Any]:
        document: dict[str, Any] = {
            "slot": node.slot,
            "kind": node.part.kind,
            "name": node.part.name,
            "path": node.path,
            "parameters": sum(parameters(below) for below in node.walk()),
            "fields": {
                name: _plain(getattr(node.part.config, name)) for name in facts_of(type(node.part.config))
            },
            "implementations": [i.name for i in node.part.component.implementations],
        }
        if choices is not None and node.path in choices:
            document["chosen"] = dict(choices[node.path])
        if node.children:
            document["children"] = {name: of(child) for name, child in node.children.items()}
        return document

    plan = spec.plan
    layers = [
        {"first": r.first, "last": r.last, **{slot: of(node) for slot, node in r.nodes.items()}}
        for r in runs(spec)
    ]
    tree = {
        "embedding": of(plan.embedding),
        "layers": layers,
        "residual": of(plan.residual),
        "head": of(plan.head),
    }
    if plan.predictor is not None:
        tree["predictor"] = of(plan.predictor)
    return {"name": spec.name, "fingerprint": spec.fingerprint, "tree": tree}


def _plain(value: Any) -> Any:
    """A field's value with names for the parts in it."""
    if isinstance(value, LayerParts):
        return {slot: held.name for slot, held in value.items()}
    return value.name if isinstance(value, Part) else plain(value)
