"""The communication parts on paper: their fields, and the bytes that they move.

Sources: DeepSeek-V3, arXiv 2412.19437, section 3.2.2 (each token crosses the slow network once per node) and
3.3.3 (dispatch in FP8, combine in BF16).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from composeformer.config import Config, config, field
from composeformer.contracts import Exchange
from composeformer.costs.ledger import Ledger, Rows
from composeformer.errors import Problem
from composeformer.rounding import Carried, Operand, cast, scaled
from composeformer.site import Site
from composeformer_comm import declared, means
from composeformer_comm.hops import Hop, flat, no_whole_nodes, two_level

# The codec of FP8 rows, a plugin's: tiles of 128 features share one scale.
TILES = "f8-1x128"

DISPATCH_FORMAT = (
    "How rows travel to experts, and gradients of results: as computed, in bfloat16, or in FP8 tiles."
)
COMBINE_FORMAT = "How results travel back, and gradients of rows: as computed, or in bfloat16."

# How far each way to travel moves a number.
WIRES = {"activations": Operand(), "bf16": cast("bfloat16"), "fp8": scaled("float8_e4m3fn", (1, declared.TILE))}


@config
class Local(Config):
    """All experts are in this process: tokens are sorted, not sent."""

    processes: ClassVar[str] = "one"

    def declared(
        self,
        indices: Sequence[Any] | Callable[[int], Any],
        *,
        groups: int,
        ranks: int,
        rows: Rows,
        backward: bool = True,
    ) -> tuple[Ledger, ...]:
        """Nothing."""
        return tuple(Ledger() for _ in range(ranks))

    def expected(
        self,
        exchanges: Iterable[Exchange],
        *,
        tokens: int,
        groups: int,
        ranks: int,
        activation: int,
        weight: int = 4,
        nodes: int | None = None,
        apart: bool = False,
        backward: bool = True,
    ) -> Ledger:
        """Nothing."""
        return Ledger()


@config
class Remote(Config):
    """What backends for several processes share. FP8 needs the codec of a plugin; combining is never in FP8,
    which sums would carry into the residual stream.
    """

    dispatch_format: str = field(
        default="activations",
        choices=("activations", "bf16", "fp8"),
        help=DISPATCH_FORMAT,
        affects="execution",
    )
    combine_format: str = field(
        default="activations", choices=("activations", "bf16"), help=COMBINE_FORMAT, affects="execution"
    )

    @property
    def per_expert(self) -> bool:
        """Whether a token has a copy for each expert rather than for each rank."""
        return False

    def hops(self, ranks: int) -> tuple[Hop, ...]:
        """The all-to-alls that a row takes, in order; InputError where the ranks are no whole nodes."""
        return ()

    def rounding(self, ranks: int) -> Carried:
        """The declared error of what travels among so many ranks."""
        return Carried(
            dispatch=WIRES[self.dispatch_format],
            combine=WIRES[self.combine_format],
            hops=max(1, len(self.hops(ranks))),
        )

    def validate(self, site: Site) -> Iterable[Problem]:
        if self.dispatch_format == "fp8" and TILES not in site.spec.registry.kinds("codec"):
            yield Problem("dispatch_format", "fp8", f"needs the codec {TILES}, of the plugin fp8")
        size, ranks = getattr(self, "ranks_per_node", None), site.spec.parallel.expert
        if size is not None and (told := no_whole_nodes(ranks, size)):
            yield Problem("ranks_per_node", size, told)

    def declared(
        self,
        indices: Sequence[Any] | Callable[[int], Any],
        *,
        groups: int,
        ranks: int,
        rows: Rows,
        backward: bool = True,
    ) -> tuple[Ledger, ...]:
        """As `composeformer.costs.ledger.CommConfig` has it; nothing for one rank."""
        return declared.ledgers(self, indices, groups, ranks, rows, backward)

    def expected(
        self,
        exchanges: Iterable[Exchange],
        *,
        tokens: int,
        groups: int,
        ranks: int,
        activation: int,
        weight: int = 4,
        nodes: int | None = None,
        apart: bool = False,
        backward: bool = True,
    ) -> Ledger:
        """As `composeformer.costs.ledger.CommConfig` has it; nothing for one rank."""
        sizes = means.Sizes(tokens=tokens, groups=groups, ranks=ranks, activation=activation, weight=weight)
        return means.ledger(self, exchanges, sizes, nodes, apart, backward)


@config
class Collective(Remote):
    """All-to-alls among all ranks: rows go straight to the rank that owns their expert."""

    copies: str = field(
        default="expert",
        choices=("expert", "rank"),
        help="A token's copy for each expert, weighed and summed at home as one process does; or for each rank, "
        "which sums its own experts first: fewer bytes, another order of sums.",
        affects="execution",
    )
    ranks_per_node: int | None = field(
        None,
        minimum=1,
        unit="ranks",
        help="Consecutive ranks that share a node, for the ledger; absent: all do.",
        affects="execution",
    )

    @property
    def per_expert(self) -> bool:
        return self.copies == "expert"

    def hops(self, ranks: int) -> tuple[Hop, ...]:
        return (flat(ranks, self.ranks_per_node),)


@config
class Hierarchical(Remote):
    """Each token crosses the slow network once per node: to the rank with its own place there, which forwards it
    to the ranks that own its experts and sums their results before they return.
    """

    ranks_per_node: int = field(
        minimum=1, unit="ranks", help="Consecutive ranks that share a node.", affects="execution"
    )

    def hops(self, ranks: int) -> tuple[Hop, ...]:
        return two_level(ranks, self.ranks_per_node)
