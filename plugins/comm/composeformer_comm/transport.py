"""The one place that calls collectives: it counts their bytes, and says who waited for whom when one fails.

The only collective is `all_to_all_single`, over the whole group: ranks that do not meet exchange nothing. It may be
started and waited for later.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch.distributed as dist
from torch import Tensor

from composeformer.costs.ledger import Content, Ledger, Step
from composeformer.errors import one_of
from composeformer.exchange import CommError
from composeformer_comm.hops import Hop

# Rows for or from each rank of the group.
Sizes = Sequence[int]
# Bytes of a row by what they are.
Contents = Sequence[tuple[Content, int]]


class Pending:
    """Rows on their way. `wait` gives those that arrive, and raises CommError where they do not."""

    def __init__(self, work: Any, sending: Tensor, arriving: Tensor, told: str) -> None:
        self._work, self._told = work, told
        self._sending: Tensor | None = sending  # must live until it is sent
        self._arriving, self._begun = arriving, time.monotonic()

    def wait(self) -> Tensor:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise CommError.of(self._told, self._begun, error) from error
        self._sending = None
        return self._arriving


class Transport:
    """The collectives of one exchange, of `group`, into `ledger`."""

    def __init__(self, group: "dist.ProcessGroup", ledger: Ledger) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.ledger = ledger
        self._started = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Transport":
        # A group is what processes made together: a copy of a model speaks through the same.
        return Transport(self.group, deepcopy(self.ledger, memo))

    def counts(self, told: Tensor, hop: Hop) -> Tensor:
        """Tells each peer of a hop C numbers, of (P, C); what the peers tell this rank, (P, C)."""
        peers = set(hop.peers(self.rank))
        sizes = [int(rank in peers) for rank in range(self.size)]
        step = Step("dispatch", "forward", f"{hop.name} counts")
        row: Contents = [("metadata", told.shape[1] * told.itemsize)]
        return self.start(told.contiguous(), sizes, sizes, hop, step, row).wait()

    def start(
        self, rows: Tensor, sent: Sizes, received: Sizes, hop: Hop, step: Step, contents: Contents
    ) -> Pending:
        """Starts to send rows (S, ...), those for each rank in turn. Raises CommError, then or in `wait`."""
        self.ledger.called(step)
        for rank in hop.peers(self.rank):
            for content, size in contents:
                link = hop.link(self.rank, rank)
                self.ledger.add(step, content, link, sent[rank] * size, received[rank] * size)
        self._started += 1
        size = sum(each for _, each in contents)
        out, into = (one_of(str(number * size) for number in sizes) for sizes in (sent, received))
        told = (
            f"rank {self.rank} of {self.size}: all_to_all_single {self._started}, {step}, sending {out} bytes to "
            f"ranks 0 to {self.size - 1} and receiving {into}"
        )
        arriving, begun = rows.new_empty((sum(received), *rows.shape[1:])), time.monotonic()
        try:
            work = dist.all_to_all_single(
                arriving, rows, list(received), list(sent), group=self.group, async_op=True
            )
        except RuntimeError as error:
            raise CommError.of(told, begun, error) from error
        return Pending(work, rows, arriving, told)
