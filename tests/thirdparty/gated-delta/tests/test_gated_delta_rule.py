"""Beside the laws of a mixer: the recurrence is the paper's, by itself and by chunks, with gradients."""

import torch
from gated_delta.cache import undone
from gated_delta.rule import Steps, chunked, recurrent
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next import modeling_qwen3_next as released

# A chain has at most 13 tokens of eight sums and products forth, and as many back: 2^8 roundings. The system of a
# chunk of six has an inverse of entries of at most 1 in magnitude, which makes an error at most 36 times larger.
ROUNDING = 2**8 * 36 * 2.0**-53


def drawn(rows: int, tokens: int, heads: int, keys: int, values: int, seed: int) -> Steps:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, tokens, heads, *shape, generator=generator, dtype=torch.float64)

    q, k = F.normalize(normal(keys), dim=-1), F.normalize(normal(keys), dim=-1)
    return Steps(q, k, normal(values), -F.softplus(4 * normal()), normal().sigmoid())


def derived(scanned: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """What was computed, and gradients of all inputs."""
    generator = torch.Generator().manual_seed(0)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in scanned)
    return [*scanned, *torch.autograd.grad(total, inputs, materialize_grads=True)]


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 13), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    st.integers(1, 6),
    st.integers(0, 2**31),
)
def test_chunks_are_the_recurrence_with_documents_padding_and_gradients(
    sizes: tuple[int, int, int, int, int], size: int, seed: int
) -> None:
    rows, tokens, heads, keys, values = sizes
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(rows, tokens, generator=generator) < 0.3
    real = torch.rand(rows, tokens, generator=generator) < 0.8
    steps = undone(drawn(*sizes, seed), real)
    state = torch.randn(rows, heads, keys, values, generator=generator, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (*steps, state)]
    for told in (None, starts & real):
        expected = derived(recurrent(Steps(*inputs[:5]), told, inputs[5]), inputs)
        found = derived(chunked(Steps(*inputs[:5]), told, inputs[5], size), inputs)
        for one, other in zip(found, expected, strict=True):
            largest = float(other.detach().abs().max())
            assert float((one - other).detach().abs().max()) <= ROUNDING * (1 + largest)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 9), st.integers(0, 2**31))
def test_the_recurrence_is_that_of_released_models(tokens: int, seed: int) -> None:
    steps = Steps(*(each.float() for each in drawn(2, tokens, 2, 4, 3, seed)))
    theirs, state = released.torch_recurrent_gated_delta_rule(
        steps.q, steps.k, steps.v, steps.g, steps.b, output_final_state=True
    )
    ours, last = recurrent(steps._replace(q=steps.q * 4**-0.5), None, torch.zeros(2, 2, 4, 3))
    # Each is a chain of at most nine steps of four-term sums in fp32, of numbers of a few units.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-5)
