"""What communication moves, in bytes: counted by a backend as it runs, or declared beforehand without torch.

Bytes are those handed to collectives by one process, told apart by what they are for. One all-to-all of a
backend is a `Step`; on each class of links it has a `Volume`, summed over all its calls. A backend's ledger
equals what its config declares, to the byte.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import attrs

from composeformer.contracts import Exchange

Link = Literal["self", "intra", "inter"]
# From a process to itself, to others of its node, to those of other nodes.
LINKS: tuple[Link, ...] = ("self", "intra", "inter")
Purpose = Literal["dispatch", "combine"]
Direction = Literal["forward", "backward"]
# Features, the scales of narrow features, and all else: counts, indices, routing weights.
Content = Literal["payload", "scales", "metadata"]
CONTENTS: tuple[Content, ...] = ("payload", "scales", "metadata")


class Step(NamedTuple):
    """One all-to-all of an exchange: what it is for, in the forward or backward pass, and along which `hop`."""

    purpose: Purpose
    direction: Direction
    hop: str

    def __str__(self) -> str:
        return f"{self.purpose} {self.direction} {self.hop}"


class Volume(NamedTuple):
    """Bytes that one process sent and received."""

    sent: float = 0
    received: float = 0

    def __add__(self, other: object) -> "Volume":
        if not isinstance(other, Volume):
            return NotImplemented
        return Volume(self.sent + other.sent, self.received + other.received)


class Ledger:
    """Bytes by step, content and link, and the number of calls by step. Equal where all of these are.

    Bytes are integers; in an expectation they are means.
    """

    def __init__(self) -> None:
        self._bytes: dict[tuple[Step, Content, Link], Volume] = {}
        self._calls: dict[Step, int] = {}

    def called(self, step: Step, times: int = 1) -> None:
        """One more call, or several."""
        self._calls[step] = self._calls.get(step, 0) + times

    def add(self, step: Step, content: Content, link: Link, sent: float = 0, received: float = 0) -> None:
        """Adds bytes; none leave no entry."""
        if sent or received:
            key = step, content, link
            self._bytes[key] = self._bytes.get(key, Volume()) + Volume(sent, received)

    def update(self, other: "Ledger") -> None:
        """Adds all of another."""
        for step, times in other._calls.items():
            self.called(step, times)
        for (step, content, link), volume in other._bytes.items():
            self.add(step, content, link, *volume)

    def reset(self) -> None:
        """Forgets everything."""
        self._bytes.clear()
        self._calls.clear()

    def steps(self) -> Iterator[tuple[Step, int]]:
        """Every step that was called, and how often, in the order of the first calls."""
        return iter(self._calls.items())

    def volume(
        self,
        *,
        step: Step | None = None,
        purpose: Purpose | None = None,
        direction: Direction | None = None,
        content: Content | None = None,
        link: Link | None = None,
    ) -> Volume:
        """The bytes of all entries that agree with what is given."""
        total = Volume()
        for (at, what, where), volume in self._bytes.items():
            wanted = (step, purpose, direction, content, link)
            found = (at, at.purpose, at.direction, what, where)
            if all(w is None or w == f for w, f in zip(wanted, found)):
                total += volume
        return total

    def only(self, *contents: Content) -> "Ledger":
        """A copy with some contents alone; calls stay."""
        copy = Ledger()
        copy.update(self)
        copy._bytes = {key: volume for key, volume in copy._bytes.items() if key[1] in contents}
        return copy

    def rows(self) -> list[dict[str, object]]:
        """A document: an entry for each step, content and link, sorted."""
        return [
            {**step._asdict(), "content": content, "link": link, **volume._asdict()}
            for (step, content, link), volume in sorted(self._bytes.items())
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and (self._bytes, self._calls) == (other._bytes, other._calls)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        listed = (f"{step} {what} {link} {v.sent}/{v.received}" for (step, what, link), v in self._items())
        return f"Ledger({'; '.join(listed)}; calls {[(str(s), n) for s, n in sorted(self._calls.items())]})"

    def _items(self) -> list[tuple[tuple[Step, Content, Link], Volume]]:
        return sorted(self._bytes.items())


@attrs.frozen(kw_only=True)
class Rows:
    """What travels for a token: `width` features, an element of `activation` bytes as the part computes them, of
    `result` bytes as its experts give them (the same unless given), and routing weights of `weight` bytes.
    """

    width: int
    activation: int
    result: int | None = None
    weight: int = 4

    @property
    def given(self) -> int:
        return self.activation if self.result is None else self.result


class CommConfig(Protocol):
    """What the config of a `comm` component declares besides its fields.

    One that can not share experts among processes says so with a class attribute `processes = "one"`.
    """

    def declared(
        self,
        indices: Sequence[Any] | Callable[[int], Any],
        *,
        groups: int,
        ranks: int,
        rows: Rows,
        backward: bool = True,
    ) -> tuple[Ledger, ...]:
        """The ledger of each of `ranks` processes after one exchange of these tokens, exactly.

        `indices[r]`, or `indices(r)`, are the groups that rank r's tokens chose out of `groups`, N lists of K or an
        array with `tolist`; `groups` itself is none.
        """

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
        """The mean of one rank's ledger, from what a part declares: an `Exchange` named `dispatch`, one `combine`.

        Each of a rank's `tokens` chooses `fan_out` distinct groups, all sets as likely; with `nodes`, sets within
        that many nodes, all choices of nodes as likely. With `apart` every copy goes to a node of its own, none to
        the token's: the most that can cross. Raises InputError for what can not be.
        """


def several(config: object) -> bool:
    """Whether a `comm` component serves several processes: all do that do not say otherwise."""
    return getattr(config, "processes", "many") == "many"


def total(ledgers: Iterable[Ledger]) -> Ledger:
    """The sum of several."""
    whole = Ledger()
    for ledger in ledgers:
        whole.update(ledger)
    return whole
