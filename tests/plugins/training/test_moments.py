"""AdamW with moments in a dtype of their own: the same algorithm, rounded only where it is kept."""

from functools import partial

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW as TorchAdamW

from composeformer.assemble import build
from composeformer.contracts import Linear
from composeformer.errors import SpecError
from composeformer.formats import plain
from composeformer.spec import Spec
from composeformer.train import Trained, trainer
from composeformer_training.adamw import make
from composeformer_training.config import AdamW
from composeformer_training.moments import MomentAdamW

MAP = Linear(name="q", inputs=3, outputs=4)


def one(dtype: torch.dtype, moment: str, seed: int = 0) -> Trained:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    stored = str(dtype).removeprefix("torch.")
    form = attrs.evolve(plain(stored, "test"), moment=moment)
    return Trained("a.q.weight", nn.Parameter(values), MAP.weight, MAP, form)


def gradients(steps: int, dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=random).to(dtype) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, trained: Trained, steps: list[Tensor]) -> Tensor:
    for gradient in steps:
        trained.parameter.grad = gradient.clone()
        optimizer.step()
    return trained.parameter.detach()


def test_kept_moments_are_the_nearest_to_the_exact_ones() -> None:
    trained = one(torch.float32, "bfloat16")
    optimizer = make(AdamW(beta1=0.9, beta2=0.95), [trained], 0.1)
    steps = gradients(3, torch.float32)
    mean = torch.zeros(4, 3)
    square = torch.zeros(4, 3)
    for gradient in steps:
        run(optimizer, trained, [gradient])
        mean = (0.9 * mean + 0.1 * gradient).bfloat16().float()
        square = (0.95 * square + 0.05 * gradient**2).bfloat16().float()
        state = optimizer.state[trained.parameter]
        # fp32 products differ in their last bit with the order of operations, which can move a tie by one unit.
        assert torch.allclose(state["exp_avg"].float(), mean, rtol=2**-8, atol=1e-9)
        assert torch.allclose(state["exp_avg_sq"].float(), square, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("moment", ["float32", "bfloat16"])
def test_a_state_is_read_into_the_dtype_that_the_policy_says_now(moment: str) -> None:
    """Whatever dtype moments were saved in, and by whom: PyTorch's own AdamW says none."""
    steps = gradients(3, torch.float32)
    for other in ("bfloat16", "float32"):
        before, after = one(torch.float32, other), one(torch.float32, moment)
        optimizer = make(AdamW(), [before], 0.1)
        run(optimizer, before, steps)
        resumed = make(AdamW(), [after], 0.1) if moment != "float32" else narrow(after)
        resumed.load_state_dict(optimizer.state_dict())
        state, saved = resumed.state[after.parameter], optimizer.state[before.parameter]
        assert resumed.param_groups[0].get("moment") == moment
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == getattr(torch, moment)
            assert torch.equal(state[name], saved[name].to(getattr(torch, moment)))


def narrow(trained: Trained) -> MomentAdamW:
    """Ours even where moments have the weights' dtype."""
    return MomentAdamW(
        [{"params": [(trained.name, trained.parameter)], "moment": "float32"}], 0.1, (0.9, 0.95), 1e-8
    )


@pytest.mark.parametrize("moment", ["float32", "bfloat16"])
def test_schedules_closures_and_missing_gradients_are_pytorchs(moment: str) -> None:
    ours, theirs = ([nn.Parameter(torch.full((2,), float(n))) for n in (1, 2)] for _ in range(2))
    optimizer = MomentAdamW([{"params": ours, "moment": moment}], 0.1, (0.0, 0.0), 1e-8)
    judge = TorchAdamW(theirs, lr=0.1, betas=(0.0, 0.0), eps=1e-8, weight_decay=0.0)
    for step in range(4):
        losses = []
        for each, (first, second) in ((optimizer, ours), (judge, theirs)):
            each.param_groups[0]["lr"] = 0.1 / (step + 1)

            losses.append(each.step(partial(closure, each, first, second if step % 2 else torch.zeros(2))))
        assert losses[0] == losses[1]
    for a, b in zip(ours, theirs, strict=True):
        # Without decay of the moments none that was rounded is ever read.
        assert torch.allclose(a, b, rtol=1e-6)
    assert float(optimizer.state[ours[1]]["step"]) == 2


def closure(optimizer: torch.optim.Optimizer, first: Tensor, second: Tensor) -> float:
    """A loss that may leave the second without a gradient."""
    optimizer.zero_grad()
    loss = (first.square() + second).sum()
    loss.backward()
    return float(loss.detach())


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients only"):
        MomentAdamW([{"params": [table.weight]}], 0.1, (0.9, 0.95), 1e-8).step()


def test_weights_that_decay_and_those_that_do_not_stay_apart() -> None:
    matrix = one(torch.float32, "bfloat16")
    norm = Trained("norm", nn.Parameter(torch.ones(3)), MAP.weight, None, plain("float32", "test"))
    norm = norm._replace(weight=attrs.evolve(MAP.weight, shape=(3,)))
    optimizer = make(AdamW(weight_decay=0.5), [matrix, norm], 0.1)
    found = {(group["moment"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {("bfloat16", 0.5), ("float32", 0.0)}


@pytest.mark.parametrize("implementation", ["auto", "reference", "fused"])
@pytest.mark.parametrize(("kind", "rule"), [("full", None), ("bf16", "layers.1.mixer.o"), ("full", "*norm*")])
def test_half_precision_is_refused_of_a_whole_model_and_of_one_tensor(
    kind: str, rule: str | None, implementation: str
) -> None:
    half = {"kind": "full", "dtype": "float16"}
    precision = half if rule is None else {"kind": kind, "rules": [{"roles": rule, "format": half}]}
    spec = Spec.load("tiny-llama").with_(
        precision=precision, optimizer={"kind": "adamw", "implementation": implementation}
    )
    with pytest.raises(SpecError) as told:
        trainer(build(spec, device="meta"))
    (line,) = told.value.lines
    first = {None: "embedding.weight", "layers.1.mixer.o": "layers.1.mixer.o.weight"}
    assert f"float16, as {first.get(rule, 'layers.0.residual.mixer_norm.weight')} is, holds neither" in line
