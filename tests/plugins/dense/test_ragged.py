"""The grouped product behind linear maps with groups, where PyTorch's own serves and where it does not."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer_dense.ragged import fused, ragged

quick = settings(max_examples=30, deadline=None, derandomize=True)
# Sums of 8 products; bfloat16 and float16 keep 8 and 11 bits.
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@contextmanager
def poisoned_memory():
    """What PyTorch leaves as it found it holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_is_poisoned():
    with poisoned_memory():
        x, matrix = torch.ones(3, 4), torch.ones(1, 4, 4)
        assert torch.nn.functional.grouped_mm(x, matrix, offs=torch.tensor([2]).int())[2].isnan().all()


@pytest.mark.parametrize("dtype", list(BOUNDS))
@quick
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    spare=st.integers(0, 3),
    bias=st.booleans(),
    ends_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_each_groups_rows_by_its_own_map_with_gradients_in_poisoned_memory(
    dtype, counts, spare, bias, ends_dtype
):
    used, groups = sum(counts), len(counts)
    generator = torch.Generator().manual_seed(used)
    x, matrix, shift, cotangent = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((used + spare, 8), (groups, 16, 8), (groups, 16), (used + spare, 16))
    )
    x[used:], cotangent[used:] = torch.nan, torch.nan
    leaves = [each.requires_grad_() for each in (x, matrix, *([shift] if bias else []))]
    ends = torch.tensor(counts).cumsum(0).to(ends_dtype)
    with poisoned_memory():
        y = ragged(x, matrix, shift if bias else None, ends)
        found = torch.autograd.grad(y, leaves, cotangent)
    group = torch.repeat_interleave(torch.arange(groups), torch.tensor(counts))
    wide = [each.detach().double().requires_grad_() for each in leaves]
    wanted = torch.einsum("ni,noi->no", wide[0][:used], wide[1][group])
    wanted = wanted + wide[2][group] if bias else wanted
    gradients = torch.autograd.grad(wanted, wide, cotangent[:used].double(), materialize_grads=True)
    assert y.shape == (used + spare, 16)
    assert not y[used:].any()
    assert not found[0][used:].any()
    for a, b in zip((y[:used], *found), (wanted, *gradients), strict=True):
        assert a.dtype == dtype
        assert torch.isfinite(a).all()
        assert not a.numel() or (a.double() - b).abs().max() <= BOUNDS[dtype] * b.abs().max().clamp(min=1)
    empty = torch.tensor(counts) == 0
    assert not any(each[empty].any() for each in found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_not_contiguous_are_taken(dtype):
    """As of a sum, whose gradient is one number expanded, or of a transpose."""
    x, matrix = torch.randn(6, 8, dtype=dtype, requires_grad=True), torch.randn(2, 4, 8, dtype=dtype)
    ends = torch.tensor([2, 6])
    for use in (lambda y: y.sum(), lambda y: (y.T * torch.arange(6)).sum(), lambda y: y[:, ::2].sum()):
        use(ragged(x, matrix, None, ends)).backward()
        found, x.grad = x.grad, None
        use(torch.cat([x[:2] @ matrix[0].T, x[2:] @ matrix[1].T])).backward()
        assert torch.allclose(found, x.grad, rtol=1e-5, atol=1e-5)
        x.grad = None


def test_inputs_that_are_not_contiguous_are_taken():
    x, matrix = torch.randn(8, 6).T, torch.randn(2, 8, 4).mT
    y = ragged(x, matrix, None, torch.tensor([2, 6]))
    assert torch.allclose(y, torch.cat([x[:2] @ matrix[0].T, x[2:] @ matrix[1].T]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "inputs", "outputs", "serves"),
    [
        (torch.float32, 8, 4, True),
        (torch.float32, 31, 4, False),
        (torch.float32, 4, 6, False),
        (torch.bfloat16, 8, 16, True),
        (torch.bfloat16, 4, 8, False),
        (torch.float64, 8, 8, False),
    ],
)
def test_it_serves_rows_of_whole_16_bytes_forward_and_backward(dtype, inputs, outputs, serves):
    x, matrix = torch.randn(5, inputs).to(dtype).requires_grad_(), torch.randn(2, outputs, inputs).to(dtype)
    assert fused(x, matrix) == serves
    y = ragged(x, matrix, None, torch.tensor([3, 5]))
    y.float().sum().backward()
    wanted = torch.cat([x[:3] @ matrix[0].T, x[3:] @ matrix[1].T])
    assert torch.allclose(y.float(), wanted.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_no_rows_at_all_are_taken_and_leave_gradients_of_zero(dtype):
    """As of a rank whose experts nobody chose."""
    x = torch.zeros(0, 8, dtype=dtype, requires_grad=True)
    matrix = torch.randn(2, 16, 8).to(dtype).requires_grad_()
    with poisoned_memory():
        y = ragged(x, matrix, None, torch.tensor([0, 0]))
        found = torch.autograd.grad(y.sum(), (x, matrix))
    assert y.shape == (0, 16)
    assert [each.shape for each in found] == [x.shape, matrix.shape]
    assert not found[1].any()


def test_without_gradients_it_is_the_same_bit_for_bit():
    x, matrix = torch.randn(5, 8), torch.randn(2, 4, 8, requires_grad=True)
    wanted = ragged(x, matrix, None, torch.tensor([3, 4]))
    with torch.no_grad():
        assert torch.equal(ragged(x, matrix, None, torch.tensor([3, 4])), wanted)
    with torch.inference_mode():
        assert torch.equal(ragged(x, matrix, None, torch.tensor([3, 4])), wanted)


def test_a_bias_of_many_narrow_rows_has_the_gradient_of_them_all():
    """One by one in bfloat16 a sum of ones ends at 256."""
    x, matrix = torch.ones(700, 8).bfloat16(), torch.ones(2, 8, 8).bfloat16()
    shift = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    y = ragged(x, matrix, shift, torch.tensor([600, 640]))
    y.backward(torch.ones_like(y))
    assert fused(x, matrix)
    assert shift.grad is not None
    assert shift.grad[:, 0].tolist() == [600, 40]


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 129), (32, 129), (33, 5), (16, 136)])
@pytest.mark.parametrize("turned", [False, True], ids=["by rows", "by columns"])
def test_the_gradients_of_few_rows_do_not_see_those_that_do_not_count(inputs, outputs, turned):
    """A product of bfloat16 on a CPU reads on behind the rows of a group, and multiplies by zero what is there."""
    x, gradient = torch.randn(38, inputs).bfloat16(), torch.randn(38, outputs).bfloat16()
    for used in (1, 2, 33):
        matrix = torch.randn(1, outputs, inputs).bfloat16().requires_grad_()
        poisoned, cotangent = x.clone(), gradient.clone()
        poisoned[used:], cotangent[used:] = torch.nan, torch.nan
        if turned:
            poisoned, cotangent = (each.mT.contiguous().mT for each in (poisoned, cotangent))
        poisoned.requires_grad_()
        ragged(poisoned, matrix, None, torch.tensor([used])).backward(cotangent)
        wanted = gradient[:used].double().mT @ x[:used].double()
        assert matrix.grad is not None
        assert poisoned.grad is not None
        assert poisoned.grad.isfinite().all()
        assert torch.allclose(matrix.grad[0].double(), wanted, rtol=2**-7, atol=2**-7)


def test_groups_multiplied_one_by_one_are_differentiated_in_every_way() -> None:
    """Twice, forward, in a function of a batch, and behind a change in place; rows past the last group as well."""
    torch.manual_seed(0)
    x, matrix = torch.randn(6, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    ends = torch.tensor([1, 4])

    def mapped(x: torch.Tensor) -> torch.Tensor:
        return ragged(x, matrix, None, ends)

    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: mapped(x) ** 2, (leaf,))
    mapped(leaf).mul_(2).sum().backward()
    assert leaf.grad is not None
    wanted = torch.func.grad(lambda x: mapped(x).sum())(x)
    torch.testing.assert_close(leaf.grad, 2 * wanted, rtol=1e-13, atol=1e-13)
    _, moved = torch.func.jvp(mapped, (x,), (x,))
    bound = BOUNDS[torch.float64]  # other kernels may add in another order
    torch.testing.assert_close(moved, mapped(x), rtol=bound, atol=bound)
    torch.testing.assert_close(torch.vmap(mapped)(x[None])[0], mapped(x), rtol=bound, atol=bound)
