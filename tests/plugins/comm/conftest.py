"""Tokens, experts and backends on forked ranks, and the same in one process: the judge.

Experts are linear maps, so that the same sums of absolute values bound every result (`Lab.scales`).
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

from composeformer.costs.ledger import Ledger, Rows
from composeformer.tensors import Routing
from composeformer.testing.ranks import on_ranks
from composeformer_comm.config import Collective, Hierarchical, Local
from composeformer_comm.local import LocalExchange
from composeformer_comm.remote import RemoteExchange
from composeformer_comm.wire import tiles

# Imported once, before ranks are forked; the last by the first gradient that is asked for (1.5 s).
for module in ("composeformer_comm.routes", "torch.fx.experimental.symbolic_shapes"):
    import_module(module)
tiles()

EXPERTS = 8


class Case(NamedTuple):
    """Tokens of each rank, what they chose (K each, EXPERTS is none), and everything random from a seed."""

    indices: tuple[tuple[tuple[int, ...], ...], ...]
    top_k: int
    width: int = 5
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def ranks(self) -> int:
        return len(self.indices)

    @property
    def rows(self) -> Rows:
        return Rows(width=self.width, activation=self.dtype.itemsize, weight=4 if self.dtype.itemsize < 8 else 8)


class Inputs(NamedTuple):
    """Of one rank, or of all together."""

    x: Tensor
    indices: Tensor
    weights: Tensor
    matrices: Tensor
    cotangent: Tensor


class Found(NamedTuple):
    """Outputs, gradients of tokens, weights and experts, each expert's rows, and the bytes."""

    y: Tensor
    to_x: Tensor
    to_weights: Tensor
    to_matrices: Tensor
    counts: Tensor
    ledger: Ledger

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self[:4]


class Lab:
    """What tests of this folder share."""

    experts = EXPERTS
    rows = Rows
    # Kinds of exchange by a short name; ranks_per_node as in two nodes.
    configs: dict[str, Callable[..., Any]] = {
        "collective": lambda ranks, **fields: Collective(**fields),
        "collective, once per rank": lambda ranks, **fields: Collective(copies="rank", **fields),
        "hierarchical": lambda ranks, **fields: Hierarchical(ranks_per_node=max(1, ranks // 2), **fields),
    }

    def inputs(self, case: Case, rank: int | None = None) -> Inputs:
        """What one rank holds; None for all of it in one process."""
        generator = torch.Generator().manual_seed(case.seed)
        sizes = [len(tokens) for tokens in case.indices]
        total = sum(sizes)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x, cotangent = normal(total, case.width).to(case.dtype), normal(total, case.width).to(case.dtype)
        weights = torch.rand(total, case.top_k, generator=generator, dtype=torch.float64)
        weights = weights.to(torch.promote_types(case.dtype, torch.float32))
        matrices = normal(EXPERTS, case.width, case.width).div(case.width**0.5).to(case.dtype)
        flat = [token for tokens in case.indices for token in tokens]
        indices = torch.tensor(flat, dtype=torch.int64).view(total, case.top_k)
        if rank is None:
            return Inputs(x, indices, weights, matrices, cotangent)
        first, own = sum(sizes[:rank]), EXPERTS // case.ranks
        here = slice(first, first + sizes[rank])
        return Inputs(
            x[here], indices[here], weights[here], matrices[rank * own : (rank + 1) * own], cotangent[here]
        )

    def run(
        self,
        exchange: Any,
        inputs: Inputs,
        around: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda compute: compute,
    ) -> Found:
        """One exchange, forward and backward; `around` wraps what computes experts."""
        x, weights, matrices = (
            each.clone().requires_grad_() for each in (inputs.x, inputs.weights, inputs.matrices)
        )
        seen: list[Tensor] = []

        def compute(rows: Tensor, counts: Tensor) -> Tensor:
            seen.append(counts)
            parts = rows.split([*counts.tolist(), len(rows) - int(counts.sum())])
            found = [part @ matrix for part, matrix in zip(parts, matrices)]
            return torch.cat([*found, torch.zeros_like(parts[-1])])

        y, _ = exchange.exchange(x, Routing(inputs.indices, weights), around(compute))
        gradients = torch.autograd.grad(y, [x, weights, matrices], inputs.cotangent)
        return Found(y.detach(), *gradients, seen[0], exchange.ledger)

    def alone(self, case: Case, **changes: Tensor) -> Found:
        """By `local`, in one process; `changes` replace inputs."""
        return self.run(LocalExchange(Local(), EXPERTS), self.inputs(case)._replace(**changes))

    def scales(self, case: Case) -> Found:
        """The same of all absolute values: sums of magnitudes, which bound what reordering and rounding change."""
        inputs = self.inputs(case)
        made = {name: getattr(inputs, name).double().abs() for name in inputs._fields if name != "indices"}
        return self.run(LocalExchange(Local(), EXPERTS), inputs._replace(**made))

    def spread(self, cases: list[Case], config: Any, timeout: float = 60.0) -> list[list[Found]]:
        """By a backend on forked ranks: of each case, what each rank found."""

        def ranks(rank: int) -> list[Found]:
            group = dist.group.WORLD
            return [
                self.run(RemoteExchange(config, EXPERTS, group), self.inputs(case, rank)) for case in cases
            ]

        found = on_ranks(cases[0].ranks, ranks, timeout=timeout)
        return [list(each) for each in zip(*found, strict=True)]

    def joined(self, found: list[Found]) -> Found:
        """What all ranks found, side by side; the first's ledger."""
        tensors = [torch.cat(each) for each in zip(*(one[:5] for one in found), strict=True)]
        return Found(*tensors, found[0].ledger)

    def cases(self, ranks: int, **fields: Any) -> "st.SearchStrategy[Case]":
        """A few tokens on each rank, none on some; experts alike, all the same, or none."""

        @st.composite
        def draw_case(draw: Any) -> Case:
            top_k = draw(st.integers(1, 4))
            some = st.permutations(range(EXPERTS)).map(lambda order: tuple(order[:top_k]))
            token = some | st.just(tuple(range(top_k))) | st.just((EXPERTS,) * top_k)
            if top_k > 1:
                token |= some.map(lambda chosen: (EXPERTS, *chosen[1:]))
            tokens = st.lists(token, max_size=5).map(tuple)
            indices = tuple(draw(tokens) for _ in range(ranks))
            made = {"width": draw(st.integers(1, 9)), "seed": draw(st.integers(0, 999))} | fields
            return Case(indices, top_k, **made)

        return draw_case()

    case = Case


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()
