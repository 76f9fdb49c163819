"""Two nodes on one machine: what crosses a slow network flat and hierarchically, against the ledger and a topology.

Two network namespaces are joined by a veth pair, and `tc` limits what each may send (tbf). In each run two gloo
ranks, bound to its end of the pair; what they send each other stays on the namespace's loopback, so the pair's
counters hold what crosses and nothing else. Experts give rows back as they are: what is timed is the exchange,
forward and backward, with bf16 activations.

Routing is DeepSeek-V3's, eight experts of a token within a few nodes: within one of the two, or anywhere in both.

Three claims are checked, and the run fails where one does not hold:
- the bytes handed to collectives, counted from their arguments, are the ledger's and the declared ones, to the byte;
- the pair's counters, both directions, exceed the bytes that the ledger says cross by at most 15% (headers,
  acknowledgements);
- results are those of `local`, within the rounding of bfloat16.

Times are the best of the repeats; those in all-to-alls leave out what ranks do between them, four on however many
processors there are. The prediction is the topology's: bandwidth between nodes is the limit set, less Ethernet, IP
and TCP headers; within a node, and the latencies, are measured beforehand by the same collective alone.

    python benchmarks/two_nodes.py      as root, with iproute2; writes benchmarks/results/two_nodes.json
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from composeformer.costs.ledger import LINKS, Ledger, Rows, total
from composeformer.costs.topology import Connection, Figure, Topology
from composeformer.tensors import Routing
from composeformer_comm.config import Collective, Hierarchical, Local
from composeformer_comm.local import LocalExchange
from composeformer_comm.remote import RemoteExchange

RESULT = Path(__file__).parent / "results" / "two_nodes.json"
RANKS, PER_NODE, EXPERTS, TOP_K = 4, 2, 64, 8
TOKENS, WIDTH, REPEATS = 512, 1024, 5
RATE = 100_000_000 / 8  # bytes a second that leave a node
# 1448 bytes of data in a frame of 1514: Ethernet 14, IP 20, TCP 32 with time stamps.
GOODPUT = RATE * 1448 / 1514
ADMITTED = 1.15

CONFIGS: dict[str, Any] = {
    "collective": Collective(ranks_per_node=PER_NODE),
    "collective, once per rank": Collective(copies="rank", ranks_per_node=PER_NODE),
    "hierarchical": Hierarchical(ranks_per_node=PER_NODE),
    "collective, fp8": Collective(ranks_per_node=PER_NODE, dispatch_format="fp8"),
    "hierarchical, fp8": Hierarchical(ranks_per_node=PER_NODE, dispatch_format="fp8"),
}


def routing(limit: int) -> list[torch.Tensor]:
    """The experts of each rank's tokens: eight within `limit` of the nodes, all choices as likely."""
    generator = torch.Generator().manual_seed(limit)
    nodes = RANKS // PER_NODE
    node_of = torch.arange(EXPERTS) // (EXPERTS // nodes)
    found = []
    for _ in range(RANKS):
        allowed = torch.rand(TOKENS, nodes, generator=generator).argsort(-1)[:, :limit]
        scores = torch.rand(TOKENS, EXPERTS, generator=generator)
        barred = (node_of[None, :, None] != allowed[:, None, :]).all(-1)
        found.append(scores.masked_fill(barred, -1.0).topk(TOP_K).indices)
    return found


# In a namespace: one rank.


class Handed:
    """Counts the bytes of collectives from their own arguments, by rank, and the time from start to arrival."""

    def __init__(self) -> None:
        self.sent, self.seconds = [0] * RANKS, 0.0
        self._real = dist.all_to_all_single

    def __enter__(self) -> "Handed":
        dist.all_to_all_single = self._counted
        return self

    def __exit__(self, *raised: Any) -> None:
        dist.all_to_all_single = self._real

    def _counted(
        self, output: torch.Tensor, rows: torch.Tensor, into: Any, out: Any, **more: Any
    ) -> "Handed":
        size = rows[0].numel() * rows.itemsize if len(rows) else 0
        self.sent = [held + number * size for held, number in zip(self.sent, out, strict=True)]
        self._begun, self._work = perf_counter(), self._real(output, rows, into, out, **more)
        return self

    def wait(self) -> None:
        """Of the one collective that is on its way."""
        self._work.wait()
        self.seconds += perf_counter() - self._begun


def counters(interface: str) -> int:
    """Bytes that an interface has sent and received."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            fields = numbers.split()
            return int(fields[0]) + int(fields[8])
    raise SystemExit(f"{interface}: no such interface")


def timed(run: Callable[[], Any]) -> float:
    """Seconds until every rank is done, from when all are there."""
    dist.barrier()
    begun = perf_counter()
    run()
    dist.barrier()
    return perf_counter() - begun


def calibrate(rank: int) -> dict[str, float]:
    """Bandwidth from a rank to itself and to its neighbour, bytes a second, and the latency of an all-to-all."""
    size = 16_000_000

    def move(peer: int, number: int) -> Callable[[], Any]:
        splits = [number if other == peer else 0 for other in range(RANKS)]
        rows = torch.zeros(number, 1, dtype=torch.uint8)
        return lambda: dist.all_to_all_single(torch.empty_like(rows), rows, splits, splits)

    def best(peer: int, number: int) -> float:
        return min(timed(move(peer, number)) for _ in range(REPEATS))

    empty = best(rank, 0)
    found = {"self": size / (best(rank, size) - empty), "intra": size / (best(rank ^ 1, size) - empty)}
    for name, peer in (("intra", rank ^ 1), ("inter", (rank + PER_NODE) % RANKS)):
        found[f"{name} latency"] = statistics.median(timed(move(peer, 8)) for _ in range(5 * REPEATS))
    return found


def measure(rank: int, name: str, limit: int, interface: str) -> dict[str, Any]:
    """One backend under one routing: times, counters and bytes, summed over the repeats."""
    config, chosen = CONFIGS[name], routing(limit)
    generator = torch.Generator().manual_seed(rank)
    x, to_y = (torch.randn(TOKENS, WIDTH, generator=generator).bfloat16() for _ in range(2))
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    weights /= weights.sum(-1, keepdim=True)
    exchange = RemoteExchange(config, EXPERTS, dist.group.WORLD)

    def once(made: Any) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y, _ = made.exchange(leaf, Routing(chosen[rank], weights), lambda rows, counts: rows)
        return y.detach(), torch.autograd.grad(y, leaf, to_y)[0]

    far = [
        ((a - b).float().abs().max() / b.float().abs().max()).item()
        for a, b in zip(once(exchange), once(LocalExchange(Local(), EXPERTS)))
    ]
    admitted = 2**-3 if config.dispatch_format == "fp8" else 2**-6
    if max(far) > admitted:
        raise SystemExit(f"{name}: results differ from local's by {max(far):.3g}")
    exchange.ledger.reset()
    declared = Ledger()
    rows = Rows(width=WIDTH, activation=2)
    of_all = config.declared(chosen, groups=EXPERTS, ranks=RANKS, rows=rows)
    dist.barrier()
    before = counters(interface)
    times, inside = [], []
    with Handed() as handed:
        for _ in range(REPEATS):
            handed.seconds = 0.0
            times.append(timed(lambda: once(exchange)))
            inside.append(handed.seconds)
            declared.update(of_all[rank])
    crossed = counters(interface) - before
    if exchange.ledger != declared:
        raise SystemExit(f"{name}: the ledger is not what is declared")
    for link in LINKS:
        peers = [peer for peer in range(RANKS) if config.hops(RANKS)[0].link(rank, peer) == link]
        said = declared.volume(link=link).sent
        if said != sum(handed.sent[peer] for peer in peers):
            raise SystemExit(f"{name}: {link}: the ledger has {said} bytes, collectives were handed others")
    inter = declared.volume(link="inter")
    return {
        "seconds": times,
        "in_collectives": inside,
        "counters": crossed,
        "inter": [inter.sent, inter.received],
        "far": max(far),
    }


def rank_main(rank: int, folder: Path, interface: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found: dict[str, Any] = {"links": calibrate(rank), "cases": {}}
    for limit in (1, 2):
        for name in CONFIGS:
            found["cases"][f"{name}|{limit}"] = measure(rank, name, limit, interface)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()


# Outside: namespaces, processes, the table.


def shell(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {' '.join(done.stderr.split())}")


@contextmanager
def nodes() -> Any:
    """Two namespaces joined by a pair of limited links; gives (namespace, interface) of each."""
    if os.geteuid() or not shutil.which("tc"):
        raise SystemExit("two_nodes.py: needs root, and ip and tc of the package iproute2")
    made = [(f"node{i}-{os.getpid()}", f"veth{i}") for i in range(2)]
    (one, end), (two, other) = made
    try:
        for name, _ in made:
            shell("ip", "netns", "add", name)
        shell("ip", "link", "add", end, "netns", one, "type", "veth", "peer", "name", other, "netns", two)
        for index, (name, interface) in enumerate(made):
            shell("ip", "-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", interface)
            shell("ip", "-n", name, "link", "set", "lo", "up")
            shell("ip", "-n", name, "link", "set", interface, "up")
            limit = ["tbf", "rate", f"{int(RATE * 8)}bit", "burst", "256kb", "limit", "32mb"]
            shell("tc", "-n", name, "qdisc", "add", "dev", interface, "root", *limit)
        yield made
    finally:
        for name, _ in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def run() -> list[dict[str, Any]]:
    """What each rank measured."""
    with nodes() as made, tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(RANKS):
            name, interface = made[rank // PER_NODE]
            words = [sys.executable, __file__, "--rank", str(rank), "--folder", folder, "--interface", interface]
            ranks.append(subprocess.Popen(["ip", "netns", "exec", name, *words]))
        try:
            if any(each.wait(timeout=600) for each in ranks):
                raise SystemExit("two_nodes.py: a rank failed")
        finally:
            for each in ranks:
                each.kill()
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def emulated(found: list[dict[str, Any]]) -> Topology:
    """The topology of what was built: the limit set, and what was measured beside it."""
    links = [each["links"] for each in found]

    def link(bandwidth: float, latency: float, shared: Any = "rank") -> Connection:
        return Connection(
            bandwidth=Figure(value=bandwidth), latency=Figure(value=latency), shared=shared
        )

    def slowest(name: str) -> float:
        return min(each[name] for each in links)

    def longest(name: str) -> float:
        return max(each[name] for each in links)

    return Topology(
        name="two nodes",
        ranks_per_node=PER_NODE,
        ranks=RANKS,
        links={
            "self": link(slowest("self"), 0.0),
            "intra": link(slowest("intra"), longest("intra latency")),
            "inter": link(GOODPUT, longest("inter latency"), "node"),
        },
    )


def table(found: list[dict[str, Any]], topology: Topology) -> list[dict[str, Any]]:
    lines = []
    for limit in (1, 2):
        chosen = routing(limit)
        for name, config in CONFIGS.items():
            cases = [each["cases"][f"{name}|{limit}"] for each in found]
            ledgers = config.declared(
                chosen, groups=EXPERTS, ranks=RANKS, rows=Rows(width=WIDTH, activation=2)
            )
            predicted = topology.time(ledgers)
            crossing = total(ledgers).volume(link="inter").sent
            # Both ends count all that crosses, each way.
            excess = [
                cases[node]["counters"] / sum(sum(case["inter"]) for case in cases[node : node + PER_NODE])
                for node in (0, PER_NODE)
            ]
            if max(excess) > ADMITTED or min(excess) < 1:
                raise SystemExit(f"{name}: the counters are {max(excess):.3f} of the bytes that cross")
            seconds, inside = (
                [max(each) for each in zip(*(case[name] for case in cases))]
                for name in ("seconds", "in_collectives")
            )
            lines.append(
                {
                    "backend": name,
                    "nodes_of_a_token": limit,
                    "crossing_MB": round(crossing / 1e6, 3),
                    "counters_over_ledger": round(max(excess), 4),
                    "seconds": round(min(seconds), 4),
                    "in_collectives": round(min(inside), 4),
                    "predicted": round(predicted.total, 4),
                    "collectives_over_predicted": round(min(inside) / predicted.total, 3),
                    "farthest_from_local": max(case["far"] for case in cases),
                }
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--interface")
    asked = parser.parse_args()
    if asked.rank is not None:
        rank_main(asked.rank, asked.folder, asked.interface)
        return
    found = run()
    topology = emulated(found)
    lines = table(found, topology)
    print(f"{'backend':27} nodes  crossing MB  counters/ledger  seconds  in all-to-alls  predicted  ratio")
    for line in lines:
        print(
            f"{line['backend']:27} {line['nodes_of_a_token']:5} {line['crossing_MB']:12.2f} "
            f"{line['counters_over_ledger']:16.3f} {line['seconds']:8.3f} {line['in_collectives']:15.3f} "
            f"{line['predicted']:10.3f} {line['collectives_over_predicted']:6.2f}"
        )
    document = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
            "kernel": platform.release(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "sizes": {
            "ranks": RANKS,
            "ranks_per_node": PER_NODE,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "tokens_of_a_rank": TOKENS,
            "width": WIDTH,
            "repeats": REPEATS,
        },
        "links": {
            name: {"bandwidth": round(link.bandwidth.value), "latency": round(link.latency.value, 6)}
            for name, link in topology.links.items()
        },
        "ledger_is_declared_and_handed_to_collectives": True,
        "table": lines,
    }
    RESULT.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
