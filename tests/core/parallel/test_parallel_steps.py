"""Steps over processes where something is unlike: no tokens, one expert for all, a loss that is not finite, passes
between steps, layers that are computed twice, other number formats.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

import composeformer as cf
from composeformer.decoder import Model
from composeformer.parallel.pieces import local
from composeformer.spec import Spec
from composeformer.tensors import Batch, ModelOutput, Output
from composeformer.testing.ranks import on_ranks
from composeformer.train import TokenBatch, train_step, trainer

from .conftest import EPS, LEARNING_RATE, Ready, Rows, joined, raw, spec, steps, together
from .test_expert_parallel import assert_close, assert_equal, numbers, whole

PLAIN = Rows(2, 7, 2, True, 1)
NOTHING = Rows(2, 7, 8, False, 2)


def on_one_expert(model: Model) -> None:
    """Makes every token choose the first two experts, of every layer: those of the first process."""
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            buffer[:2] = 100.0


@pytest.mark.parametrize(("kind", "empty"), [("collective", 0), ("collective", 3), ("hierarchical", 1)])
def test_no_tokens_on_a_rank_and_all_on_one_expert(kind: str, empty: int) -> None:
    bring = [[NOTHING if rank == empty else PLAIN._replace(seed=rank)] for rank in range(4)]
    case = (spec(4, kind=kind), [bring], 1.0, on_one_expert)
    many = together(4, [case])[0]
    assert_equal(many, steps(range(4), *case), 4)
    load = many[0].results[0].counts["layers.1.ffn.router.load"]
    assert int(load[2:].sum()) == 0
    assert int(load[0]) == many[0].results[0].tokens


def test_rows_too_short_for_the_predictor_beside_long_ones() -> None:
    """With a mask of their own, and without one."""
    short = PLAIN._replace(length=1)
    case = (spec(2), [[[short], [PLAIN]], [[PLAIN], [short._replace(padding=0)]], [[short]] * 2])
    assert_equal(together(2, [case])[0], steps(range(2), *case), 2)


@pytest.mark.parametrize("used", [0, 1])
def test_a_parameter_that_one_process_alone_uses_has_its_gradient_in_all(used: int) -> None:
    """A part may leave its weights alone for some tokens: here for rows that begin with another number."""

    def at_times(model: Model) -> None:
        ffn: Any = model.layers[0].ffn
        always = ffn.forward
        ffn.forward = lambda x, batch: always(x, batch) if int(batch.ids[0, 0]) == used else Output(x * 0)

    bring = [[Ready(TokenBatch(torch.tensor([[first, 5, 6, 7]])))] for first in (0, 1)]
    case = (spec(2, shard=False), [bring], 1.0, at_times)
    many = together(2, [case])[0]
    assert_equal(many, steps(range(2), *case), 2)
    assert float(many[1 - used].gradients["layers.0.ffn.gate.weight"].value.abs().max()) > 0


def test_nothing_to_learn_anywhere_skips_the_step_and_moves_nothing() -> None:
    many = together(2, [(spec(2), [[[NOTHING], [NOTHING]]])])[0]
    assert [m.results[0].skipped for m in many] == ["no token has a label"] * 2
    before = cf.build(spec(), seed=3).state_dict()
    assert {n: raw(t) for n, t in joined([m.weights for m in many], 2).items()} == {
        n: raw(t) for n, t in before.items()
    }


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    def run(rank: int) -> tuple[Any, ...]:
        model = cf.build(spec(2), seed=3)
        objective, optimizer = trainer(model)

        class Broken:
            weight = staticmethod(objective.weight)

            def __call__(self, outputs: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
                loss, weight = objective(outputs, batch)
                return (loss * torch.inf if rank == 1 else loss), weight

        before = {name: raw(local(t)) for name, t in model.state_dict().items()}
        result = train_step(model, [PLAIN.batch()], Broken(), optimizer, step=0)
        after = {name: raw(local(t)) for name, t in model.state_dict().items()}
        again = train_step(model, [PLAIN.batch()], objective, optimizer, step=1)
        return result.skipped, before == after, again.skipped, numbers(again)

    told = on_ranks(2, run)
    assert told[0][:3] == ("the loss is not finite (inf)", True, None)
    assert told[0] == told[1]


@pytest.mark.parametrize("shard", [False, True])
def test_passes_between_steps_change_nothing(shard: bool) -> None:
    """With gradients or without; also before the optimizer is made."""

    def run(rank: int) -> list[list[tuple[Any, ...]]]:
        found = []
        for between in ([], [False], [True], [True, False]):
            model = cf.build(spec(2, shard), seed=3)
            passes(model, between)
            objective, optimizer = trainer(model)
            found.append([])
            for step in range(2):
                found[-1].append(numbers(train_step(model, [PLAIN.batch()], objective, optimizer, step=step)))
                passes(model, between)
        return found

    def passes(model: Model, grads: list[bool]) -> None:
        model.eval()
        for grad in grads:
            with torch.set_grad_enabled(grad):
                model(PLAIN.batch().ids, valid=PLAIN.batch().valid)
        model.train()

    for found in on_ranks(2, run):
        assert found == [found[0]] * 4


@pytest.mark.parametrize(("place", "shard"), [("ffn", True), ("layer", True), ("layer", False)])
def test_layers_computed_twice_send_the_same_tokens_again(place: str, shard: bool) -> None:
    def again(model: Model) -> None:
        layer: Any = model.layers[1]
        owner = layer if place == "layer" else layer.ffn
        once = owner.forward
        owner.forward = lambda *args: checkpoint(once, *args, use_reentrant=False)

    plan = [[[PLAIN, PLAIN._replace(seed=7)], [PLAIN._replace(seed=3), NOTHING]]]
    case = (spec(2, shard), plan)
    plain, twice = together(2, [case, (*case, None, again)])
    for a, b in zip(plain, twice, strict=True):
        assert [numbers(result) for result in a.results] == [numbers(result) for result in b.results]
        assert {n: raw(t.value) for n, t in a.gradients.items()} == {
            n: raw(t.value) for n, t in b.gradients.items()
        }


def test_gradients_travel_once_a_step_whatever_its_micro_batches() -> None:
    def run(rank: int) -> list[Counter[str]]:
        found: list[Counter[str]] = []
        # PyTorch has renamed the second; one may call the other.
        for name in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single"):
            if hasattr(dist, name):
                setattr(dist, name, counted(name, getattr(dist, name), found))
        for shard in (False, True):
            model = cf.build(spec(2, shard), seed=3)
            objective, optimizer = trainer(model)
            for number in (1, 3):
                found.append(Counter())
                train_step(model, [PLAIN.batch()] * number, objective, optimizer, step=0)
                found.append(Counter())
        return found[::2]

    def counted(name: str, call: Callable[..., Any], found: list[Counter[str]]) -> Callable[..., Any]:
        def calls(*args: Any, **kwargs: Any) -> Any:
            if found:
                found[-1][name] += 1
            return call(*args, **kwargs)

        return calls

    for whole_one, whole_three, one, three in on_ranks(2, run):
        assert whole_one == whole_three
        assert set(whole_one) == {"all_reduce"}
        assert one == three
        # The layers, the predictor, and the ends.
        assert set(one.values()) == {one["all_reduce"], 4}


def test_parameters_of_another_dtype_stay_whole_beside_shards() -> None:
    rules = [{"roles": "*norm", "format": {"kind": "full", "dtype": "float32"}}]
    mixed = spec(2).with_({"precision.rules": rules})
    case = (mixed, [[[PLAIN], [PLAIN._replace(seed=3)]]] * 2)
    many = together(2, [case])[0]
    hows = {name: each.how for name, each in many[0].weights.items()}
    assert hows["layers.0.residual.mixer_norm.weight"] == "whole"
    assert hows["layers.0.ffn.gate.weight"] == "shard"
    assert_equal(many, steps(range(2), *case), 2, close=1000 * torch.finfo(torch.float32).eps)


def test_the_shipped_miniature_of_deepseek_in_fp32_by_grouped_products() -> None:
    shipped = Spec.load("tiny-deepseek-v3", ("parallel.expert=2",)).with_(
        comm={"kind": "collective"},
        optimizer={"kind": "adamw", "eps": EPS},
        train={"learning_rate": LEARNING_RATE},
    )
    assert cf.build(shipped, device="meta").choices["layers.1.ffn"]["train"] == "grouped"
    plan = [[[PLAIN._replace(seed=10 * step + rank)] for rank in range(4)] for step in range(2)]
    many = together(4, [(shipped, plan)])[0]
    assert_equal(many, steps(range(4), shipped, plan), 2, close=1000 * torch.finfo(torch.float32).eps)


def merged(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Rows of one length as one batch."""
    valid = [torch.ones_like(b.ids, dtype=torch.bool) if b.valid is None else b.valid for b in batches]
    documents = [torch.zeros_like(b.ids) if b.documents is None else b.documents for b in batches]
    return TokenBatch(torch.cat([b.ids for b in batches]), torch.cat(valid), torch.cat(documents))


@pytest.mark.parametrize("kind", ["bf16", "fp8-block"])
@pytest.mark.parametrize("shard", [False, True])
def test_scaled_formats_give_the_gradients_of_experts_bit_by_bit(kind: str, shard: bool) -> None:
    """An expert sees the same rows in the same order, wherever they come from. Of other maps each process rounds the
    product of its own tokens: what that may differ by is as much for a forward on the tokens of one process after the
    other.
    """
    data = spec(2, shard).to_dict()
    found = Spec.from_dict({**data, "precision": {"kind": kind}})
    own = [
        merged([Rows(count, 8, padding, True, seed).batch()])
        for count, padding, seed in ((2, 2, 5), (3, 0, 6))
    ]
    many = together(2, [(found, [[[Ready(batch)] for batch in own]])])[0]
    one = steps([0], found, [[[Ready(merged(own))]]])
    apart = steps([0], found, [[[Ready(batch) for batch in own]]])
    got, wanted = joined([m.gradients for m in many], 2), whole(one.gradients)
    experts = {name for name, each in many[0].gradients.items() if each.how == "expert"}
    assert len(experts) == 6
    assert {name: raw(got[name]) for name in experts} == {name: raw(wanted[name]) for name in experts}
    rest = {name: each for name, each in whole(apart.gradients).items() if name not in experts}
    eps = 1000 * torch.finfo(torch.float32).eps
    assert_close({name: got[name] for name in rest}, rest, eps)
    norm = sum(float(each.double().square().sum()) for each in got.values()) ** 0.5
    for here in many:
        assert here.results[0].loss == pytest.approx(one.results[0].loss, rel=eps)
        assert here.results[0].grad_norm == pytest.approx(norm, rel=eps)
