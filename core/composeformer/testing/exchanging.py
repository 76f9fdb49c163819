"""A communication backend under test: tokens and experts on forked ranks, and what they must give by the definition.

    y_n = sum_k w_nk (x_n M_e + c_e)        e the k-th expert of token n; the number of experts is none of them

Experts are affine, so that weights do not commute with them, and that the same sums of absolute values bound every
result. They compute in float64 and give the dtype of their rows.

Shapes: N tokens of a rank, D features, K experts a token, G experts in all, E of a rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import attrs
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

from composeformer import lazy
from composeformer.costs.ledger import Ledger, Rows
from composeformer.errors import ComposeError
from composeformer.rounding import FLOATS, Carried
from composeformer.tensors import DTYPES, Routing
from composeformer.testing.case import Case
from composeformer.testing.maps import Bounded, configured, operand_error
from composeformer.testing.ranks import on_ranks

# Imported once, before ranks are forked, not by the first gradient on each of them.
import_module("torch.fx.experimental.symbolic_shapes")

PRECISIONS = ("float32", "bfloat16", "float64")
# Tokens of a rank; that some have none comes after that most have some.
NUMBERS = st.sampled_from([2, 3, 0, 1, 5])
TIMEOUT = 30.0
NAMES = ("y", "x", "weights", "matrices", "shifts")
COLLECTIVES = (
    "all_to_all_single",
    "all_to_all",
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "barrier",
)


@attrs.frozen(kw_only=True, eq=False)
class Given:
    """Of one rank, or of all together."""

    x: Tensor
    indices: Tensor
    weights: Tensor
    matrices: Tensor
    shifts: Tensor
    cotangent: Tensor


class Exchanged:
    """One exchange in a case: who has which tokens, which experts they chose, and all values."""

    def __init__(
        self,
        case: Case,
        *,
        ranks: Sequence[int] = (2, 1, 4),
        each: Sequence[int] = (2, 1, 3),
        top_k: Sequence[int] = (2, 1, 3),
        dtype: str | None = None,
    ) -> None:
        self.case = case
        self.config = configured(case).config
        self.alone = getattr(self.config, "processes", None) == "one"
        self.ranks = 1 if self.alone else case.choice("ranks", ranks)
        self.each = case.choice("experts of a rank", each)
        self.groups = self.ranks * self.each
        self.top_k = min(case.choice("top_k", top_k), self.groups)
        self.width = case.choice("width", (1, 5, 130))
        self.dtype = DTYPES[dtype or case.choice("dtype", PRECISIONS)]
        self.indices: list[list[list[int]]] = [
            case.draw(f"tokens of rank {rank}", self._tokens()) for rank in range(self.ranks)
        ]
        self.nan = case.choice("nobody's weight", ("NaN", "a number")) == "NaN"
        self._seed = case.integer("values", 0, 2**16)
        self.declared()  # where ranks are no whole nodes, say, there is no case

    def _tokens(self) -> "st.SearchStrategy[list[list[int]]]":
        """A few tokens, or none: experts alike, the same for all, the last rank's, or nobody's."""
        k, groups = self.top_k, self.groups
        some = st.permutations(range(groups)).map(lambda order: list(order[:k]))
        token = (
            some | st.just(list(range(k))) | st.just(list(range(groups - k, groups))) | st.just([groups] * k)
        )
        token |= some.map(lambda chosen: [groups, *chosen[1:]])
        return NUMBERS.flatmap(lambda number: st.lists(token, min_size=number, max_size=number))

    @property
    def rows(self) -> Rows:
        size = self.dtype.itemsize
        return Rows(width=self.width, activation=size, weight=max(4, size))

    def declared(self, backward: bool = True, indices: Any = None) -> tuple[Ledger, ...]:
        """The bytes that its config declares."""
        try:
            found: tuple[Ledger, ...] = self.config.declared(
                self.indices if indices is None else indices,
                groups=self.groups,
                ranks=self.ranks,
                rows=self.rows,
                backward=backward,
            )
        except ComposeError as error:
            self.case.draw.reject(str(error))
        return found

    def given(self, rank: int | None = None) -> Given:
        """What one rank holds; None for all of it."""
        generator = torch.Generator().manual_seed(self._seed)
        sizes = [len(tokens) for tokens in self.indices]
        total = sum(sizes)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x, cotangent = normal(total, self.width).to(self.dtype), normal(total, self.width).to(self.dtype)
        weights = normal(total, self.top_k).to(torch.promote_types(self.dtype, torch.float32))
        matrices, shifts = normal(self.groups, self.width, self.width), normal(self.groups, self.width)
        flat = [token for tokens in self.indices for token in tokens]
        indices = torch.tensor(flat, dtype=torch.int64).view(total, self.top_k)
        if self.nan:
            weights = weights.masked_fill(indices == self.groups, torch.nan)
        start, own = (0, slice(None))
        tokens = slice(None)
        if rank is not None:
            start = sum(sizes[:rank])
            tokens, own = slice(start, start + sizes[rank]), slice(rank * self.each, (rank + 1) * self.each)
        return Given(
            x=x[tokens],
            indices=indices[tokens],
            weights=weights[tokens],
            matrices=matrices[own],
            shifts=shifts[own],
            cotangent=cotangent[tokens],
        )

    # What a backend gives

    def make(self, group: Any = None) -> Any:
        """A backend of the process group, or alone."""
        return lazy.load(self.case.subject.implementation.module)(self.config, self.groups, group)

    def everywhere(self, function: Callable[[int, Any], Any]) -> list[Any]:
        """`function(rank, group)` on every rank; where there is one, in this process and without a group."""
        if self.ranks == 1:
            return [function(0, None)]
        self.make()  # what this imports, ranks do not import again
        return on_ranks(self.ranks, lambda rank: function(rank, dist.group.WORLD), timeout=TIMEOUT)

    def run(self, made: Any, given: Given) -> dict[str, Tensor]:
        """Results and gradients by name, and `counts`."""
        x, weights, matrices, shifts = (
            each.clone().requires_grad_() for each in (given.x, given.weights, given.matrices, given.shifts)
        )
        counted: list[Tensor] = []

        def experts(rows: Tensor, counts: Tensor) -> Tensor:
            counted.append(counts)
            return affine(rows, counts, matrices, shifts)

        y, _ = made.exchange(x, Routing(given.indices, weights), experts)
        gradients = torch.autograd.grad(y, (x, weights, matrices, shifts), given.cotangent)
        return dict(zip(NAMES, (y.detach(), *gradients), strict=True)) | {"counts": counted[0]}

    def joined(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What all ranks found, side by side."""
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    # What must come of it

    def counts(self) -> Tensor:
        """How many rows each expert has, of all ranks."""
        chosen = self.given().indices.flatten()
        return torch.bincount(chosen, minlength=self.groups + 1)[: self.groups]

    def bounded(self) -> dict[str, Bounded]:
        """All results by the definition, in float64, and how far a backend's may be from them."""
        all_ = self.given()
        rounding = getattr(self.config, "rounding", None)
        carried = Carried() if rounding is None or self.ranks == 1 else rounding(self.ranks)
        exact = self.defined(all_)
        # Rounding on the way out moves rows, and gradients of results; what is linear in them by as much.
        least = self.defined(all_, torch.abs)
        x, cotangent = (
            each.double().abs() + operand_error(each.double(), carried.dispatch)
            for each in (all_.x, all_.cotangent)
        )
        most = self.defined(attrs.evolve(all_, x=x, cotangent=cotangent), torch.abs)
        unit = FLOATS[str(self.dtype).removeprefix("torch.")][0]
        sums = FLOATS["float64" if self.dtype == torch.float64 else "float32"][0]
        terms = len(all_.x) * self.top_k + self.width + 8
        # An expert rounds its result and its gradient; each hop what it sums; the end its own.
        factor = (1 + unit) ** (4 + 2 * carried.hops) * (1 + 4 * terms * sums) - 1
        found = {}
        for name, value in exact.items():
            bound = most[name] * (1 + factor) - least[name]
            back = most[name].view(len(value), -1) if value.numel() else most[name]
            if name in ("y", "x") and value.numel():
                for _ in range(carried.hops):
                    bound = bound + (1 + factor) * operand_error(back + bound, carried.combine)
            elif name in ("weights", "matrices", "shifts"):
                # Results that were rounded on their way are not what weights are multiplied with again.
                bound = bound + (1 + factor) * carried.combine.relative * most[name]
            found[name] = Bounded(exact=value, bound=bound)
        return found

    def defined(self, given: Given, of: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Results and gradients token by token, in float64; `of` is taken of all values before."""
        none = (given.indices == self.groups)[..., None]
        held = (
            given.x,
            given.weights.masked_fill(none[..., 0], 0),
            given.matrices,
            given.shifts,
            given.cotangent,
        )
        values = [each.double() if of is None else of(each.double()) for each in held]
        x, weights, matrices, shifts = (each.clone().requires_grad_() for each in values[:4])
        own = given.indices.clamp(max=self.groups - 1)
        results = torch.einsum("nd,nkdf->nkf", x, matrices[own]) + shifts[own]
        y = (weights[..., None] * results.masked_fill(none, 0)).sum(1)
        gradients = torch.autograd.grad(y, (x, weights, matrices, shifts), values[4])
        return dict(zip(NAMES, (y.detach(), *gradients), strict=True))


def affine(rows: Tensor, counts: Tensor, matrices: Tensor, shifts: Tensor) -> Tensor:
    """Each expert's rows by its own map; those that belong to none come out zero, whatever they hold."""
    parts = torch.split(rows, [*counts.tolist(), len(rows) - int(counts.sum())])
    found = [part.double() @ m + c for part, m, c in zip(parts, matrices, shifts, strict=False)]
    return torch.cat([*found, torch.zeros_like(parts[-1], dtype=torch.float64)]).to(rows.dtype)


@contextmanager
def recorded() -> Iterator[list[tuple[Any, ...]]]:
    """Every collective of this process as it starts: its name, and what is alike on all ranks."""
    calls: list[tuple[Any, ...]] = []
    module: Any = dist
    before = {name: getattr(module, name) for name in COLLECTIVES}

    def noting(name: str, real: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            kinds = [(str(each.dtype), tuple(each.shape[1:])) for each in args if isinstance(each, Tensor)]
            calls.append((name, *kinds))
            return real(*args, **kwargs)

        return noted

    for name, real in before.items():
        setattr(module, name, noting(name, real))
    try:
        yield calls
    finally:
        for name, real in before.items():
            setattr(module, name, real)
