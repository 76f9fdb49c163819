"""Laws of communication backends: on any ranks they give what the definition gives, and move what they declare.

Shapes: N tokens of a rank, D features, K experts a token, G experts in all, E of a rank.
"""

from itertools import combinations
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from composeformer.contracts import Exchange
from composeformer.costs.ledger import CONTENTS, LINKS, Ledger, Rows, total
from composeformer.errors import ComposeError
from composeformer.tensors import Routing
from composeformer.testing.bounds import SAFETY, roundoff
from composeformer.testing.case import Case
from composeformer.testing.exchanging import TIMEOUT, Exchanged, Given, affine, recorded
from composeformer.testing.law import law
from composeformer.testing.maps import Bounded, configured, near
from composeformer.testing.ranks import on_ranks
from composeformer.testing.subject import Subject


def of_several(subject: Subject) -> str | None:
    """Why there are no ranks to try it on."""
    one = getattr(subject.component.config, "processes", None) == "one"
    return "it is for one process" if one else None


@law(
    "comm",
    "definition",
    "outputs and every gradient are sums over a token's experts of weight times result, wherever these are",
    kills="weights-before-experts",
    examples=15,
)
def definition(case: Case) -> None:
    tried = Exchanged(case)
    found = tried.joined(
        tried.everywhere(lambda rank, group: tried.run(tried.make(group), tried.given(rank)))
    )
    case.equal(found.pop("counts"), tried.counts(), "rows of each expert")
    wanted = tried.bounded()
    for name, each in found.items():
        near(case, each, wanted[name], name)


@law(
    "comm",
    "bytes",
    "what is handed to collectives is what the config declares, to the byte, and is received as it was sent",
    kills="metadata-is-not-counted",
    examples=8,
)
def bytes_(case: Case) -> None:
    tried = Exchanged(case)

    def ledgers(rank: int, group: Any) -> tuple[Ledger, Ledger, Ledger]:
        made, forward = tried.make(group), tried.make(group)
        once, given = Ledger(), tried.given(rank)
        tried.run(made, given)
        once.update(made.ledger)
        tried.run(made, given)
        with torch.no_grad():
            forward.exchange(given.x, Routing(given.indices, given.weights), _affine(given))
        return once, made.ledger, forward.ledger

    declared, half = tried.declared(), tried.declared(backward=False)
    for rank, (once, twice, forward) in enumerate(tried.everywhere(ledgers)):
        case.equal(once, declared[rank], f"the ledger of rank {rank}")
        case.equal(twice, total([declared[rank]] * 2), f"the ledger of rank {rank} after a second exchange")
        case.equal(forward, half[rank], f"the ledger of rank {rank} without gradients")
    whole = total(declared)
    for step, _ in whole.steps():
        for link in LINKS:
            volume = whole.volume(step=step, link=link)
            case.equal(volume.sent, volume.received, f"{step} {link}: bytes sent, and received")
    arrays = [torch.tensor(tokens).view(-1, tried.top_k) for tokens in tried.indices]
    case.equal(tried.declared(indices=arrays), declared, "what is declared for arrays")
    case.equal(
        tried.declared(indices=arrays.__getitem__), declared, "what is declared for a function of the rank"
    )


@law(
    "comm",
    "order",
    "all ranks run the same collectives in the same order, whatever their tokens chose and need a gradient of",
    kills="an-idle-rank-stays-away",
    applies=of_several,
    examples=6,
)
def order(case: Case) -> None:
    tried = Exchanged(case, ranks=(2, 4))
    idle = [
        {n: case.boolean(f"{n} of rank {r}") for n in ("x", "weights", "experts")} for r in range(tried.ranks)
    ]

    def calls(rank: int, group: Any) -> list[Any]:
        made, seen = tried.make(group), []
        for given, still in (
            (tried.given(rank), idle[rank]),
            (_elsewhere(tried, rank), dict.fromkeys(idle[rank])),
        ):
            x, weights = given.x.clone(), given.weights.clone()
            x.requires_grad_(not still["x"])
            weights.requires_grad_(not still["weights"])
            matrices = given.matrices.clone().requires_grad_(not still["experts"])
            with recorded() as found:
                y, _ = made.exchange(
                    x,
                    Routing(given.indices, weights),
                    lambda rows, counts, m=matrices, c=given.shifts: affine(rows, counts, m, c),
                )
                y.backward(given.cotangent)
            seen.append(found)
        return [*seen, list(made.ledger.steps())]

    ranks = tried.everywhere(calls)
    for rank, found in enumerate(ranks):
        case.equal(found, ranks[0], f"collectives of rank {rank}, of rank 0")
        case.equal(found[1], found[0], f"collectives of rank {rank} whatever was chosen")


def _elsewhere(tried: Exchanged, rank: int) -> Given:
    """The same tokens, all to the first experts."""
    given = tried.given(rank)
    return attrs.evolve(given, indices=torch.arange(tried.top_k).expand(given.indices.shape).clone())


@law(
    "comm",
    "beside",
    "what is to be computed beside is computed once, given back, and has its gradient",
    kills="beside-twice",
    examples=6,
)
def beside(case: Case) -> None:
    tried = Exchanged(case)
    leading = case.choice("leading", ((-1,), (1, -1), (-1, 1)))

    def run(rank: int, group: Any) -> Any:
        given, calls = tried.given(rank), []
        x = given.x.view(*leading, tried.width).requires_grad_()

        def meanwhile() -> Tensor:
            calls.append(rank)
            return 3 * x

        indices, weights = (each.view(*leading, tried.top_k) for each in (given.indices, given.weights))
        routing = Routing(indices, weights)
        made = tried.make(group)
        y, found = made.exchange(x, routing, _affine(given), meanwhile)
        nothing = tried.make(group).exchange(x, routing, _affine(given))
        torch.autograd.backward([y, nothing[0]], [torch.zeros_like(y)] * 2)
        if found is not None:
            found.sum().backward()
        kinds = [(tuple(each.shape), each.dtype) for each in (y, x)]
        return len(calls), found, x.grad, kinds, nothing[1], y.detach(), nothing[0].detach()

    for number, found, gradient, kinds, nothing, y, again in tried.everywhere(run):
        case.equal(number, 1, "computed beside, times")
        case.require(found is not None, "what was computed beside is not given back")
        case.require(nothing is None, "something is given back where nothing is computed beside")
        case.equal(kinds[0], kinds[1], "shape and dtype of the output")
        case.equal(gradient, torch.full_like(gradient, 3), "the gradient of what was computed beside")
        case.equal(y, again, "the output, with something beside and without")


@law(
    "comm",
    "steps",
    "an exchange is a dispatch, the experts, and a combine in fp32 or wider; rows are sorted by expert",
    kills="rows-by-rank",
    examples=10,
)
def steps(case: Case) -> None:
    tried = Exchanged(case)
    rounds = getattr(tried.config, "rounding", None)
    carried = None if rounds is None or tried.ranks == 1 else rounds(tried.ranks)

    def run(rank: int, group: Any) -> Any:
        given, made = tried.given(rank), tried.make(group)
        routing = Routing(given.indices, given.weights)
        with torch.no_grad():
            rows, counts, sent = made.dispatch(given.x, routing)
            combined = made.combine(_affine(given)(rows, counts), sent)
            whole, _ = tried.make(group).exchange(given.x, routing, _affine(given))
        return rows, counts, combined, whole

    found = tried.everywhere(run)
    everybody, counts = tried.given(), tried.counts()
    for rank, (rows, told, combined, whole) in enumerate(found):
        own = range(rank * tried.each, (rank + 1) * tried.each)
        case.equal(told, counts[own.start : own.stop], "rows of each expert")
        case.equal(rows.dtype, tried.dtype, "the dtype of rows")
        case.require(torch.finfo(combined.dtype).bits >= 32, f"results are summed in {combined.dtype}")
        case.equal(combined.to(tried.dtype).view(whole.shape), whole, "the steps, and the exchange")
        if carried is not None and carried.dispatch.relative:
            continue
        begin = 0
        for expert, number in zip(own, told.tolist(), strict=True):
            tokens = everybody.x[(everybody.indices == expert).any(1)]
            mine = rows[begin : begin + number]
            case.equal(_sorted(mine), _sorted(tokens), f"the rows of expert {expert}")
            begin += number


def _sorted(rows: Tensor) -> Tensor:
    """Rows in an order of their own."""
    order = sorted(range(len(rows)), key=lambda n: rows[n].tolist())
    return rows[order]


@law(
    "comm",
    "wide-sums",
    "in one process rows are weighed and summed in fp32, however narrow they are, forward and backward",
    kills="weights-are-narrowed",
    examples=8,
)
def wide_sums(case: Case) -> None:
    tried = Exchanged(case, ranks=(1,), dtype="bfloat16")
    k = 8
    made = type(tried.make())(tried.config, k, None)
    one = case.integer("the large one", 0, k - 1)
    values = torch.ones(k, 4, dtype=torch.bfloat16)
    values[one] = 256
    weights = torch.ones(1, k)
    weights[0, one] = 1 + 2.0**-12
    x = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    chosen = case.draw("order", _orders(k))
    rows, _, sent = made.dispatch(x, Routing(torch.tensor([chosen]), weights[:, chosen]))
    found = made.combine(values, sent)
    case.require(found.dtype in (torch.float32, torch.float64), f"summed in {found.dtype}")
    case.equal(
        found.double(), torch.full((1, 4), 256 * (1 + 2.0**-12) + k - 1, dtype=torch.float64), "the sum"
    )
    rows.backward(values)
    assert x.grad is not None
    case.equal(x.grad, torch.full((1, 4), 256.0 + k, dtype=torch.bfloat16), "the gradient")
    _rounded_once(case, made, x, chosen)
    case.equal(made.ledger, Ledger(), "the bytes of one process")


def _rounded_once(case: Case, made: Any, x: Tensor, chosen: list[int]) -> None:
    """The gradient of a row is its weight times its token's, rounded to its dtype once; a weight's is not rounded."""
    k = len(chosen)
    values = case.normal("rows", k, 4, dtype=torch.bfloat16).requires_grad_()
    weights = case.normal("weights of rows", 1, k, dtype=torch.float32).requires_grad_()
    _, _, sent = made.dispatch(x, Routing(torch.tensor([chosen]), weights[:, chosen]))
    found = made.combine(values, sent)
    g = case.normal("of the sum", 1, 4, dtype=torch.bfloat16)
    found.backward(g.to(found.dtype))
    assert values.grad is not None
    assert weights.grad is not None
    exact = weights.detach().double().T * g.double()
    unit, wide = roundoff(torch.bfloat16), SAFETY * roundoff(torch.float32)
    bound = (unit + 2 * wide) * exact.abs() + torch.finfo(torch.bfloat16).tiny
    near(case, values.grad, Bounded(exact=exact, bound=bound), "the gradient of rows")
    products = values.detach().double() * g.double()
    wanted, sizes = products.sum(1)[None], products.abs().sum(1)[None]
    near(case, weights.grad, Bounded(exact=wanted, bound=wide * sizes), "the gradient of weights")


def _orders(number: int) -> Any:
    from hypothesis import strategies as st

    return st.permutations(range(number)).map(list)


@law(
    "comm",
    "again",
    "the same exchange gives the same bits again, with gradients and without",
    kills="sums-as-they-arrive",
    examples=6,
)
def again(case: Case) -> None:
    tried = Exchanged(case, each=(2, 4), top_k=(4,))

    def run(rank: int, group: Any) -> list[dict[str, Tensor]]:
        given, made = tried.given(rank), tried.make(group)
        found = [tried.run(made, given) for _ in range(4)]
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                y, _ = made.exchange(given.x, Routing(given.indices, given.weights), _affine(given))
                found.append({"y": y.clone()})
        return found

    for first, *others in tried.everywhere(run):
        for other in others:
            for name, each in other.items():
                case.equal(each, first[name], name)


@law(
    "comm",
    "in-flight",
    "tokens are combined as they were dispatched, whatever was dispatched since",
    kills="sent-is-kept-on-the-backend",
    examples=6,
)
def in_flight(case: Case) -> None:
    tried = Exchanged(case)

    def run(rank: int, group: Any) -> list[Tensor]:
        given = tried.given(rank)
        elsewhere = torch.where(
            given.indices < tried.groups, (given.indices + 1) % tried.groups, given.indices
        )
        other = attrs.evolve(given, x=given.x.flip(0), indices=elsewhere, weights=-2 * given.weights)
        made, found = tried.make(group), []
        alone = [tried.run(tried.make(group), each) for each in (given, other)]
        leaves, results = [], []
        sent = []
        for each in (given, other):
            x = each.x.clone().requires_grad_()
            rows, counts, token = made.dispatch(x, Routing(each.indices, each.weights))
            leaves.append(x)
            sent.append((rows, counts, token))
        for each, (rows, counts, token) in zip((given, other), sent, strict=True):
            results.append(made.combine(_affine(each)(rows, counts), token).to(each.x.dtype))
        for y, x, wanted in zip(results, leaves, alone, strict=True):
            (gradient,) = torch.autograd.grad(y, x, given.cotangent)
            found += [y.detach(), wanted["y"], gradient, wanted["x"]]
        return found

    names = ("y", "the gradient of x") * 2
    for found in tried.everywhere(run):
        for name, one, alone in zip(names, found[::2], found[1::2], strict=True):
            case.equal(one, alone, name)


@law(
    "comm",
    "processes",
    "a backend of one process refuses several; every other declares nothing where it is alone",
    kills="several-processes-are-taken",
    examples=3,
)
def processes(case: Case) -> None:
    tried = Exchanged(case, ranks=(1,))
    case.equal(tried.declared(), (Ledger(),), "the bytes of one process")
    if not tried.alone:
        return

    def refuses(rank: int) -> bool:
        try:
            tried.make(dist.group.WORLD)
        except ComposeError:
            return True
        return False

    case.equal(on_ranks(2, refuses, timeout=TIMEOUT), [True, True], "refused by each of two processes")


@law(
    "comm",
    "expected",
    "the bytes expected are the mean of what is declared for all that tokens can choose",
    kills="expected-counts-copies-twice",
    applies=of_several,
    examples=25,
)
def expected(case: Case) -> None:
    config = configured(case).config
    ranks = case.choice("ranks", (2, 4))
    groups, k = ranks * case.integer("experts of a rank", 1, 3), case.choice("top_k", (2, 1))
    width, backward = case.choice("width", (3, 130)), case.boolean("backward")
    nodes, chosen = within_nodes(case, config, groups, ranks, k)
    sizes: dict[str, Any] = {"groups": groups, "ranks": ranks, "backward": backward}
    sums = Ledger()
    try:
        # Ranks choose alone and bytes add: all choices of one token, of one rank after another.
        for rank in range(ranks):
            tokens: list[list[list[int]]] = [chosen if r == rank else [] for r in range(ranks)]
            for each in config.declared(tokens, rows=Rows(width=width, activation=2), **sizes):
                sums.update(each)
    except ComposeError as error:
        case.draw.reject(str(error))
    exchanges = [Exchange(name=name, elements=width, fan_out=k) for name in ("dispatch", "combine")]
    mean = config.expected(exchanges, tokens=1, activation=2, nodes=nodes, **sizes)
    case.equal({step for step, _ in mean.steps()}, {step for step, _ in sums.steps()}, "steps")
    for step, _ in mean.steps():
        for link in LINKS:
            for content in CONTENTS:
                wanted = sums.volume(step=step, link=link, content=content)
                found = mean.volume(step=step, link=link, content=content)
                # What peers tell ahead of rows depends on no token: here it was told once for each rank that chose.
                times = ranks * (ranks if _constant(config, sizes, width, step) else len(chosen))
                exact = Bounded(
                    exact=torch.tensor([each / times for each in wanted], dtype=torch.float64),
                    bound=torch.tensor([2.0**-40 * (1 + each) for each in wanted], dtype=torch.float64),
                )
                near(case, torch.tensor(found, dtype=torch.float64), exact, f"{step} {content} {link}")


def within_nodes(
    case: Case, config: Any, groups: int, ranks: int, k: int
) -> tuple[int | None, list[list[int]]]:
    """How many nodes a token's groups lie within, None for any; and all K groups that it can choose, each as likely as
    it is listed.
    """
    size = getattr(config, "ranks_per_node", None) or ranks
    number = ranks // size if ranks % size == 0 else 1
    nodes = case.choice("nodes", [None, *range(1, number + 1)])
    owned = groups // number
    if nodes is not None and k > nodes * owned:
        case.draw.reject("a token's groups are more than its nodes have")
    among = combinations(range(number), number if nodes is None else nodes)
    return nodes, [
        list(each)
        for visited in among
        for each in combinations([g for g in range(groups) if g // owned in visited], k)
    ]


@law(
    "comm",
    "links",
    "what ranks of a node send each other is on its links, what others do between nodes, one's own on neither",
    kills="links-by-place-in-the-node",
    applies=of_several,
    examples=12,
)
def links(case: Case) -> None:
    """Of a token that chose one group: its row travels to the owner's rank, along one hop or several."""
    config = configured(case).config
    ranks = case.choice("ranks", (4, 2))
    each = case.integer("experts of a rank", 1, 3)
    sender, owner = case.integer("sender", 0, ranks - 1), case.integer("owner", 0, ranks - 1)
    size = getattr(config, "ranks_per_node", None) or ranks
    tokens = [[[owner * each]] if rank == sender else [] for rank in range(ranks)]
    try:
        found = config.declared(
            tokens, groups=ranks * each, ranks=ranks, rows=Rows(width=3, activation=2), backward=True
        )
    except ComposeError as error:
        case.draw.reject(str(error))
    moved = {
        link: sum(ledger.volume(link=link, content="payload").sent for ledger in found) for link in LINKS
    }
    apart = sender // size != owner // size
    case.equal(moved["inter"] > 0, apart, "whether a row goes from node to node")
    if sender == owner:
        case.equal(moved["intra"], 0, "bytes of one's own row inside the node")
    elif not apart:
        case.require(moved["intra"] > 0, "a row of another rank of the node is not on its links")


def _constant(config: Any, sizes: dict[str, Any], width: int, step: Any) -> bool:
    """Whether a step moves the same where nobody has a token."""
    nobody: list[list[list[int]]] = [[] for _ in range(sizes["ranks"])]
    none = total(config.declared(nobody, rows=Rows(width=width, activation=2), **sizes))
    return none.volume(step=step).sent > 0


def _affine(given: Given) -> Any:
    return lambda rows, counts: affine(rows, counts, given.matrices, given.shifts)
