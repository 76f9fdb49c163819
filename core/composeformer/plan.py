"""A model on paper: the tree of its parts with every tensor they declare, without torch.

A `Planner` walks the parts as a model joins them, validates each at its site and asks it for its tensors.
Counts, roles, placement, initial values and the meta build all read this tree.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import attrs

from composeformer.blame import blame, described
from composeformer.contracts import Child, Cost, Linear, Part, Phase, Weight
from composeformer.errors import ComposeError, PluginError, Problem, join
from composeformer.site import Site

if TYPE_CHECKING:
    from composeformer.spec import Spec

MAX_NODES = 200_000


@attrs.frozen(eq=False, kw_only=True)
class Node:
    """A part at its site, with its own tensors and its children by name.

    `part` has its site's defaults filled in; `stated` is the part as the spec has it.
    """

    part: Part
    stated: Part
    site: Site
    linears: Mapping[str, Linear]
    weights: Mapping[str, Weight]
    children: Mapping[str, "Node"]
    # What the config states of its costs, by phase; `costs.counts.stated` asks it once.
    stated_costs: dict[Phase, Sequence[Cost]] = attrs.field(init=False, factory=dict, repr=False)

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def slot(self) -> str:
        return self.part.slot

    def walk(self) -> Iterator["Node"]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def tensors(self) -> Iterator[tuple[str, Weight]]:
        """Every tensor of this node alone, by full name, aliases included."""
        for linear in self.linears.values():
            for weight in linear.weights:
                yield join(self.path, weight.name), weight
        for weight in self.weights.values():
            yield join(self.path, weight.name), weight


@attrs.frozen(eq=False, kw_only=True)
class Plan:
    """The whole model: its ends, its layers' parts by slot, and what may follow."""

    embedding: Node
    layers: Sequence[Mapping[str, Node]]
    residual: Node
    head: Node
    predictor: Node | None = None

    def nodes(self) -> Iterator[Node]:
        """Every part in the order of computation, the predictor last."""
        yield from self.embedding.walk()
        for layer in self.layers:
            for node in layer.values():
                yield from node.walk()
        yield from self.residual.walk()
        yield from self.head.walk()
        if self.predictor is not None:
            yield from self.predictor.walk()

    @cached_property
    def tensors(self) -> Mapping[str, Weight]:
        """Every tensor once, by its full name; an alias (`same_as`) is left to the tensor that it is."""
        return {name: w for node in self.nodes() for name, w in node.tensors() if w.same_as is None}

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """The names that are another tensor, and which."""
        every = (named for node in self.nodes() for named in node.tensors())
        return {name: weight.same_as for name, weight in every if weight.same_as is not None}

    @cached_property
    def linears(self) -> Mapping[str, Linear]:
        """Every linear map by its role."""
        return {join(node.path, name): one for node in self.nodes() for name, one in node.linears.items()}


class Planner:
    """Builds nodes and gathers problems; a part with problems of its own is not entered."""

    def __init__(self, spec: "Spec") -> None:
        self.spec = spec
        self.problems: list[tuple[Part, Problem]] = []
        self._seen: set[tuple[object, ...]] = set()
        self._count = 0

    def node(
        self, part: Part, path: str, width: int, layer: int | None = None, sublayers: tuple[str, ...] = ()
    ) -> Node | None:
        """The part at `path`, or None where it, or a part below it, is impossible there.

        Raises PluginError for a config that fails or declares wrongly, ComposeError for a model of too many parts.
        """
        site = Site(path=path, slot=part.slot, layer=layer, width=width, spec=self.spec, sublayers=sublayers)
        return self._node(part, site)

    def _node(self, part: Part, site: Site) -> Node | None:
        self._count += 1
        if self._count > MAX_NODES:
            raise ComposeError(f"{site.path}: the model has more than {MAX_NODES} parts")
        registry = self.spec.registry
        with blame(registry, part, site.path, "validate"):
            wrong = list(part.config.validate(site))
        for problem in wrong:
            # A component named once is used at many sites; one finding is told once.
            key = (part.paths, problem.field, str(problem.found), problem.allowed)
            if key not in self._seen:
                self._seen.add(key)
                self.problems.append((part, problem))
        if wrong:
            return None
        linears: dict[str, Linear] = {}
        weights: dict[str, Weight] = {}
        children: dict[str, Node] = {}
        complete = True
        with blame(registry, part, site.path, "filled"):
            filled = attrs.evolve(part, config=part.config.filled(site))
        with blame(registry, part, site.path, "tensors"):
            declarations = list(filled.config.tensors(site))
        for declared in declarations:
            if not isinstance(declared, Linear | Weight | Child):
                sort = type(declared).__name__
                raise PluginError(f"{described(registry, part, site.path)}: tensors declares a {sort}")
            if declared.name in linears or declared.name in weights or declared.name in children:
                raise PluginError(
                    f"{described(registry, part, site.path)}: tensors declares {declared.name} twice"
                )
            if isinstance(declared, Linear):
                linears[declared.name] = declared
            elif isinstance(declared, Weight):
                weights[declared.name] = declared
            else:
                below = self._node(declared.part, site.below(declared))
                complete = complete and below is not None
                if below is not None:
                    children[declared.name] = below
        if not complete:
            return None
        return Node(part=filled, stated=part, site=site, linears=linears, weights=weights, children=children)
