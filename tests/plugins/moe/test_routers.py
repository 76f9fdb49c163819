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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 1200])
def test_equal_logits_choose_the_first_experts_of_the_first_groups(lab, kind, rows):
    router = lab.router({"kind": kind, "top_k": 3, "num_groups": 2, "top_k_groups": 1}, 8)
    x = torch.full((1, rows, 8), 0.7)
    assert torch.equal(router(x, lab.batch(x)).indices, torch.arange(3).expand(1, rows, 3))


def groups_by_definition(scores, num_groups, top_k_groups, group_score):
    size = scores.shape[-1] // num_groups
    best_of = [
        sorted((row[g * size : (g + 1) * size]).tolist(), reverse=True)
        for row in scores
        for g in range(num_groups)
    ]
    values = torch.tensor([max(v) if group_score == "max" else v[0] + v[1] for v in best_of])
    chosen = wanted_best(values.view(-1, num_groups), top_k_groups)
    return [{g * size + i for g in row for i in range(size)} for row in chosen.tolist()]


@quick
@given(
    data=st.data(),
    groups=st.integers(2, 4),
    size=st.integers(2, 3),
    group_score=st.sampled_from(["max", "top2"]),
)
def test_experts_are_of_the_best_groups_whatever_the_sign_of_the_bias(data, lab, groups, size, group_score):
    """Also where all biased scores are negative, so that zero would beat them."""
    experts, top_k_groups = groups * size, data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_k_groups * size))
    table = {"top_k": top_k, "num_groups": groups, "top_k_groups": top_k_groups, "group_score": group_score}
    router = lab.router({"kind": "sigmoid-bias", **table}, experts)
    biases = st.lists(st.floats(-9, 3, width=32), min_size=experts, max_size=experts)
    router.bias.copy_(torch.tensor(data.draw(biases)) - data.draw(st.sampled_from([0, 20])))
    x = torch.randn(1, 5, experts, generator=torch.Generator().manual_seed(experts))
    indices = router(x, lab.batch(x)).indices[0]
    biased = x[0].sigmoid() + router.bias
    allowed = groups_by_definition(biased, groups, top_k_groups, group_score)
    for chosen, inside, scores in zip(indices.tolist(), allowed, biased.tolist(), strict=True):
        assert len(set(chosen)) == top_k
        assert chosen == sorted(inside, key=lambda i, scores=scores: (-scores[i], i))[:top_k]


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_a_group_of_minus_infinity_is_below_all_and_ties_between_groups_go_to_the_lowest(group_score):
    scores = torch.tensor([[-3.0, -3.0, -1.0, -2.0, -1.0, -2.0]])
    masked = in_best_groups(scores, 3, 1, group_score)
    assert torch.equal(masked, torch.tensor([[-torch.inf, -torch.inf, -1, -2, -torch.inf, -torch.inf]]))


def test_group_scores_are_the_best_or_the_two_best():
    scores = torch.tensor([[9.0, 0.0, 5.0, 5.0]])
    assert best(in_best_groups(scores, 2, 1, "max"), 2).tolist() == [[0, 1]]
    assert best(in_best_groups(scores, 2, 1, "top2"), 2).tolist() == [[2, 3]]


@pytest.mark.parametrize("normalize", [True, False])
def test_a_bias_changes_the_selection_only(lab, normalize):
    """One that shifts all experts alike changes nothing, bit for bit; others change who is chosen, not a weight."""
    table = {"kind": "sigmoid-bias", "top_k": 3, "normalize": normalize, "routed_scaling_factor": 2.5}
    router, x = lab.router(table, 8), lab.stream(2, 9, dtype=torch.float32)[..., :8]
    plain = router(x, lab.batch(x))
    router.bias.fill_(-7.25)
    shifted = router(x, lab.batch(x))
    assert torch.equal(plain.indices, shifted.indices)
    assert torch.equal(plain.weights, shifted.weights)
    router.bias.copy_(torch.linspace(3, -3, 8))
    moved = router(x, lab.batch(x))
    assert torch.equal(moved.indices, torch.arange(3).expand(2, 9, 3))
    scores = x[..., :3].sigmoid()
    wanted = 2.5 * (scores / scores.sum(-1, keepdim=True) if normalize else scores)
    assert torch.allclose(moved.weights, wanted, rtol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(
    low=st.sampled_from([-1e4, -300.0, -80.0, -5.0, 0.0, 80.0]),
    spread=st.sampled_from([0.0, 1e-3, 4.0, 200.0]),
    factor=st.sampled_from([1.0, 2.5, 16.0]),
    seed=st.integers(0, 99),
)
def test_normalised_weights_sum_to_the_factor_for_any_logits(lab, kind, low, spread, factor, seed):
    """Also where all sigmoids underflow, with finite gradients."""
    router = lab.router({"kind": kind, "top_k": 4, "routed_scaling_factor": factor}, 8)
    x = (low + spread * torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    weights = router(x, lab.batch(x)).weights
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    assert (weights.sum(-1) / factor - 1).abs().max() < 1e-6
    (weights * torch.arange(4)).sum().backward()
    assert torch.isfinite(x.grad).all()


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


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_softmax_groups_are_ranked_by_probability(lab, group_score):
    table = {"top_k": 2, "num_groups": 3, "top_k_groups": 2, "group_score": group_score}
    router = lab.router({"kind": "softmax", **table}, 9)
    x = 2 * torch.randn(1, 50, 9, generator=torch.Generator().manual_seed(3))
    probabilities = x[0].softmax(-1)
    inside = groups_by_definition(probabilities, 3, 2, group_score)
    for chosen, allowed, scores in zip(router(x, lab.batch(x)).indices[0].tolist(), inside, x[0].tolist()):
        assert chosen == sorted(allowed, key=lambda i, scores=scores: -scores[i])[:2]


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
