"""Which experts routers choose, and with which weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer_moe.choice import FEW, best, in_best_groups, ranks

quick = settings(max_examples=40, deadline=None, derandomize=True)
# Values that tie often, also through signs of zero.
tied = st.sampled_from([-torch.inf, -1e30, -2.0, -0.5, -0.0, 0.0, 0.5, 2.0, 1e-45, -1e-45, torch.inf])
KINDS = ("sigmoid-bias", "softmax")


def wanted_best(scores, k):
    """By definition: the largest first, among equals the lowest index."""
    order = [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:k] for row in scores.tolist()]
    return torch.tensor(order)


@quick
@given(data=st.data(), experts=st.integers(1, 12), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_choice_is_exact_and_ties_go_to_the_lowest_index(data, experts, dtype):
    row = st.lists(tied | st.floats(-3, 3, width=32), min_size=experts, max_size=experts)
    scores = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4)), dtype=dtype)
    k = data.draw(st.integers(1, experts))
    wanted = wanted_best(scores, k)
    assert torch.equal(best(scores, k), wanted)
    if dtype == torch.float32:
        # What serves many scores serves few alike.
        assert torch.equal(ranks(scores).topk(k).indices, wanted)
        many = scores.repeat(FEW // scores.numel() + 1, 1)
        assert torch.equal(best(many, k), wanted.repeat(FEW // scores.numel() + 1, 1))


@pytest.mark.parametrize("rows", [1, 3000])
def test_coarse_and_equal_scores_choose_alike_in_any_number(rows):
    coarse = torch.randint(0, 4, (rows, 64), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(best(coarse, 8), coarse.sort(dim=-1, descending=True, stable=True).indices[:, :8])
    assert torch.equal(best(torch.zeros(rows, 64), 8), torch.arange(8).expand(rows, -1))


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_a_group_of_minus_infinity_is_below_all_and_ties_between_groups_go_to_the_lowest(group_score):
    scores = torch.tensor([[-3.0, -3.0, -1.0, -2.0, -1.0, -2.0]])
    masked = in_best_groups(scores, 3, 1, group_score)
    assert torch.equal(masked, torch.tensor([[-torch.inf, -torch.inf, -1, -2, -torch.inf, -torch.inf]]))


def test_group_scores_are_the_best_or_the_two_best():
    scores = torch.tensor([[9.0, 0.0, 5.0, 5.0]])
    assert best(in_best_groups(scores, 2, 1, "max"), 2).tolist() == [[0, 1]]
    assert best(in_best_groups(scores, 2, 1, "top2"), 2).tolist() == [[2, 3]]


@quick
@given(seed=st.integers(0, 99), scale=st.floats(0.1, 6.0))
def test_normalised_sigmoids_are_the_released_codes_within_rounding(lab, seed, scale):
    router = lab.router({"kind": "sigmoid-bias", "top_k": 4, "routed_scaling_factor": 2.5}, 16)
    x = scale * torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(seed))
    routing = router(x, lab.batch(x))
    chosen = x.sigmoid().gather(-1, routing.indices)
    wanted = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * 2.5
    # A logarithm of size 25 has an error of 2e-6.
    assert torch.allclose(routing.weights, wanted, rtol=5e-6)


def test_normalised_sigmoids_in_fp64_far_below_zero(lab):
    router = lab.router(
        {"kind": "sigmoid-bias", "top_k": 4}, 16, precision={"kind": "full", "dtype": "float64"}
    )
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 - 22
    routing = router(x, lab.batch(x))
    chosen = x.sigmoid().gather(-1, routing.indices)
    lab.close(routing.weights, chosen / chosen.sum(-1, keepdim=True), 1e-13)


def test_softmax_weights_by_definition(lab):
    x = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))
    all_of_them = x.double().softmax(-1)
    indices = wanted_best(x[0], 3)[None]
    chosen = all_of_them.gather(-1, indices)
    shares = chosen / chosen.sum(-1, keepdim=True)
    for table, wanted in (
        ({"normalize": False}, chosen),
        ({"normalize": False, "routed_scaling_factor": 16.0}, 16 * chosen),
        ({}, shares),
        ({"softmax": "after"}, shares),
        ({"softmax": "after", "routed_scaling_factor": 2.0}, 2 * shares),
    ):
        router = lab.router({"kind": "softmax", "top_k": 3, **table}, 8)
        routing = router(x, lab.batch(x))
        assert torch.equal(routing.indices, indices)
        assert torch.allclose(routing.weights.double(), wanted, rtol=1e-6)


def test_probabilities_that_round_to_zero_are_still_told_apart(lab):
    router = lab.router({"kind": "softmax", "top_k": 3}, 4)
    x = torch.tensor([[[0.0, -400.0, -300.0, -350.0]]])
    assert router(x, lab.batch(x)).indices.tolist() == [[[0, 2, 3]]]


@pytest.mark.parametrize("kind", KINDS)
def test_routing_is_fp32_and_the_same_under_every_policy(lab, kind):
    """Given equal inputs and weights that bfloat16 holds."""
    found = []
    x = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    mixing = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    for precision in (
        {"kind": "full", "dtype": "float32"},
        {"kind": "full", "dtype": "bfloat16"},
        {"kind": "bf16"},
    ):
        router = lab.router({"kind": kind, "top_k": 3}, 8, precision=precision)
        with torch.no_grad():
            router.gate.weight.copy_(mixing)
        found.append(router(x, lab.batch(x)))
    for routing in found:
        assert routing.weights.dtype == torch.float32
        assert torch.equal(routing.indices, found[0].indices)
        assert torch.equal(routing.weights, found[0].weights)
    wide = lab.router({"kind": kind, "top_k": 3}, 8, precision={"kind": "full", "dtype": "float64"})
    assert wide(x.double(), lab.batch(x)).weights.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [1, 1200])
def test_logits_that_are_not_finite_spoil_their_own_token_only(lab, kind, value, rows):
    router = lab.router({"kind": kind, "top_k": 3, "num_groups": 4, "top_k_groups": 2}, 8)
    x = torch.randn(1, rows, 8, generator=torch.Generator().manual_seed(0))
    spoilt = torch.cat([x, torch.full((1, 1, 8), value)], 1)
    wanted, found = router(x, lab.batch(x)), router(spoilt, lab.batch(spoilt))
    assert torch.equal(found.indices[:, :-1], wanted.indices)
    assert torch.equal(found.weights[:, :-1], wanted.weights)
    last = found.indices[0, -1]
    assert last.unique().numel() == 3
    assert 0 <= last.min() <= last.max() < 8
