"""A tiny model of DeepSeek's parts in float64, batches of every shape, and steps of it in one process or in many."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# What ranks import is imported before they are forked: PyTorch's compiler, which its sharded tensors load, takes
# seconds.
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
from hypothesis import strategies as st
from torch import Tensor

import composeformer as cf
import composeformer.parallel.sharding
import composeformer.store
from composeformer.decoder import Model
from composeformer.parallel.pieces import is_shard, local
from composeformer.spec import Spec
from composeformer.testing.ranks import on_ranks
from composeformer.train import StepResult, TokenBatch, train_step, trainer

VOCAB = 19
LEARNING_RATE, EPS = 0.01, 1e-3
MODEL: dict[str, Any] = {
    "model": {"vocab_size": VOCAB, "hidden_size": 16, "max_position_embeddings": 64, "init_std": 0.3},
    "norm": {"kind": "rmsnorm"},
    "position": {"kind": "rope"},
    "mixer": {
        "kind": "mla",
        "num_heads": 2,
        "q_lora_rank": 6,
        "kv_lora_rank": 5,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
    },
    "ffn": {
        "dense": {"kind": "swiglu", "intermediate_size": 11},
        "experts": {
            "kind": "moe",
            "num_experts": 8,
            "num_shared_experts": 1,
            "intermediate_size": 8,
            "router": {
                "kind": "sigmoid-bias",
                "top_k": 2,
                "num_groups": 4,
                "top_k_groups": 2,
                "routed_scaling_factor": 2.5,
                "bias_update_speed": 0.01,
                "sequence_balance_alpha": 0.01,
            },
        },
    },
    "layers": [{"ffn": "dense"}, {"ffn": "experts"}],
    "predictor": {"kind": "mtp", "layer": {"ffn": "experts"}},
    "precision": {"kind": "full", "dtype": "float64"},
    "optimizer": {"kind": "adamw", "eps": EPS},
    "train": {"learning_rate": LEARNING_RATE},
}
# (processes, processes that share the experts)
LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))


def spec(experts: int = 1, shard: bool = True, kind: str = "collective", **changes: Any) -> Spec:
    """The model over expert groups of so many processes; `changes` are dotted paths with `__` for dots."""
    found = Spec.from_dict(MODEL)
    comm: dict[str, Any] = {"kind": kind}
    if kind == "hierarchical":
        comm["ranks_per_node"] = max(1, experts // 2)
    found = found.with_({"parallel": {"expert": experts, "shard": shard}}, comm=comm)
    return (
        found.with_({path.replace("__", "."): value for path, value in changes.items()}) if changes else found
    )


class Rows(NamedTuple):
    """One micro-batch of one process: its shape, how much is padding (in eighths), whether documents are packed."""

    count: int
    length: int
    padding: int
    packed: bool
    seed: int

    def batch(self) -> TokenBatch:
        random = torch.Generator().manual_seed(self.seed)
        shape = self.count, self.length
        ids = torch.randint(0, VOCAB, shape, generator=random)
        valid = torch.randint(0, 8, shape, generator=random) >= self.padding
        documents = torch.randint(0, 3, shape, generator=random).sort(1).values
        return TokenBatch(ids, valid if self.padding else None, documents if self.packed else None)


rows = st.builds(
    Rows,
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([0, 0, 2, 8]),
    st.booleans(),
    st.integers(0, 2**31),
)


class Ready(NamedTuple):
    """One micro-batch that is made already."""

    made: TokenBatch

    def batch(self) -> TokenBatch:
        return self.made


# Steps of processes of micro-batches.
Plan = Sequence[Sequence[Sequence[Rows | Ready]]]


@st.composite
def plans(draw: st.DrawFn, size: int, steps: int = 3) -> Plan:
    """What each of `size` processes brings to each step: as many micro-batches as the others, of any shapes."""
    found = []
    for _ in range(steps):
        number = draw(st.integers(1, 2))
        found.append([[draw(rows) for _ in range(number)] for _ in range(size)])
    return found


class Held(NamedTuple):
    """A tensor as one process holds it: `how` is whole, by expert group, or a shard."""

    how: str
    value: Tensor


class Steps(NamedTuple):
    """What several steps did, and the first one's gradients and the last one's weights as a process holds them."""

    results: list[StepResult]
    gradients: dict[str, Held]
    weights: dict[str, Held]


def held(model: Any, tensors: dict[str, Tensor]) -> dict[str, Held]:
    def how(name: str, tensor: Tensor) -> str:
        if is_shard(tensor):
            return "shard"
        return "whole" if model.placement.groups(name) is None else "expert"

    return {name: Held(how(name, t), local(t.detach()).clone()) for name, t in tensors.items()}


def steps(
    ranks: Sequence[int],
    found: Spec,
    plan: Plan,
    clip_norm: float | None = None,
    change: Callable[[Model], None] = lambda model: None,
) -> Steps:
    """All of a plan's steps in this process, with the batches of `ranks`, of a model that is changed before."""
    model = cf.build(found, seed=3)
    change(model)
    objective, optimizer = trainer(model)
    results, gradients = [], {}
    for number, bring in enumerate(plan):
        batches = [one.batch() for rank in ranks for one in bring[rank]]
        result = train_step(model, batches, objective, optimizer, step=number, clip_norm=clip_norm)
        results.append(result)
        if not number:
            taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            gradients = held(model, taken)
    return Steps(results, gradients, held(model, model.state_dict()))


def together(size: int, cases: Sequence[tuple[Any, ...]]) -> list[list[Steps]]:
    """`steps` of every case (a spec, a plan and what follows) on `size` processes: for each case, of each process."""

    def run(rank: int) -> list[Steps]:
        return [steps([rank], *case) for case in cases]

    return [list(each) for each in zip(*on_ranks(size, run, timeout=100))]


def joined(parts: Sequence[dict[str, Held]], experts: int) -> dict[str, Tensor]:
    """What processes hold, as one would; what several hold must be the same, bit by bit."""
    names = {tuple(part) for part in parts}
    assert len(names) == 1
    found = {}
    for name, first in parts[0].items():
        values = [part[name].value for part in parts]
        if first.how == "shard":
            found[name] = torch.cat(values)
            continue
        apart = experts if first.how == "expert" else 1
        for rank, value in enumerate(values):
            assert raw(value) == raw(values[rank % apart]), f"{name} differs between processes"
        found[name] = torch.cat(values[:apart]) if apart > 1 else values[0]
    return found


def raw(tensor: Tensor) -> bytes:
    """The bits of a tensor of any dtype."""
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


torch.set_num_threads(1)
