"""Where a part sits in a model: its path, layer and widths, and the spec around it.

A config reads the site on the description plane to declare tensors and check itself; the tensor plane
extends it with the linear maps, weights and children that were declared.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from composeformer.contracts import Child, Part
from composeformer.errors import join

if TYPE_CHECKING:
    from composeformer.spec import Spec


@attrs.frozen(kw_only=True)
class Site:
    """`path` is the dotted place (`layers.3.mixer`), `layer` its number (None outside layers), `width` the
    features of its input. `sublayers` names what a residual joins, in order; empty at a model's ends. `sizes`
    is what the part around it tells: `num_experts` to a router. `rows` is how many rows of its input there are for
    each token, `reads` the name of that tensor: parts that have the same read the same.
    """

    path: str
    slot: str
    layer: int | None
    width: int
    spec: "Spec" = attrs.field(repr=False)
    sublayers: tuple[str, ...] = ()
    sizes: Mapping[str, int] = attrs.field(factory=dict)
    rows: int = 1
    reads: str = attrs.field(default=attrs.Factory(lambda self: join(self.path, "input"), takes_self=True))

    @property
    def hidden_size(self) -> int:
        return self.spec.model.hidden_size

    @property
    def num_layers(self) -> int:
        return len(self.spec.layers)

    def part(
        self,
        part: Part,
        name: str,
        width: int | None = None,
        sublayers: tuple[str, ...] = (),
        rows: int = 1,
        same_input: bool = False,
        **sizes: int,
    ) -> Child:
        """Declares a child at `<path>.<name>`; its width is this site's unless given."""
        return Child(
            name=name,
            part=part,
            width=self.width if width is None else width,
            sublayers=sublayers,
            sizes=sizes,
            rows=rows,
            same_input=same_input,
        )

    def below(self, child: Child) -> "Site":
        """The site of a declared child."""
        path = join(self.path, child.name)
        return Site(
            path=path,
            slot=child.part.slot,
            layer=self.layer,
            width=child.width,
            spec=self.spec,
            sublayers=child.sublayers,
            sizes=child.sizes,
            rows=self.rows * child.rows,
            reads=self.reads if child.same_input else join(path, "input"),
        )
