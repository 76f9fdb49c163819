"""What tests of number formats need: tables, tensors, and what an error is measured in. Needs hypothesis.

Nothing else of the plugin imports it.
"""

from typing import Any

import torch
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from composeformer_fp8.configs.recipe import Recipe
from composeformer_fp8.numbers import SMALLEST_SCALE, Narrow
from composeformer_fp8.quantise import Block, spread

CONTENTS = ("even", "wide", "huge", "zeros", "integers")
# Not whole blocks of 128 in most ways to be so; 576 rows are those of DeepSeek-V3's `kv_a`.
SIZES = st.sampled_from([1, 2, 31, 33, 127, 128, 129, 300, 576])


def _tables(kind: str) -> "st.SearchStrategy[dict[str, Any]]":
    """Every option as likely as another, but accumulators: others than the default take long."""
    always = {
        "kind": st.just(kind),
        "weights": st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]),
        "scales": st.sampled_from(["float32", "ue8m0"]),
        "gradients": st.sampled_from(["e4m3", "e5m2"]),
    }
    seldom = st.sampled_from([{}, {}, {}, {"promotion": 0}, {"accumulator_bits": 14}])
    moments = st.sampled_from([{}, {"moments": "float32"}])
    return st.builds(lambda *found: found[0] | found[1] | found[2], st.fixed_dictionaries(always), seldom, moments)


def fp8_blocks() -> "st.SearchStrategy[dict[str, Any]]":
    """`fp8-block`."""
    return _tables("fp8-block")


def fp8_tensors() -> "st.SearchStrategy[dict[str, Any]]":
    """`fp8-tensor`."""
    return _tables("fp8-tensor")


def content(sort: str, shape: tuple[int, ...], seed: int) -> Float[Tensor, "*S"]:
    """fp32 numbers: normal ones, ones over 60 binades, one huge among small, with rows of zeros, or small integers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if sort == "wide":
        return x * torch.exp2(torch.randint(-30, 31, shape, generator=generator).float())
    if sort == "integers":
        return torch.randint(-8, 9, shape, generator=generator).float()
    if sort == "huge" and x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = 1e6
    if sort == "zeros":
        x[..., torch.rand(shape[-1], generator=generator) < 0.5] = 0
        x[..., : shape[-2] // 2, :] = 0
    return x


def tensors(rows: st.SearchStrategy[int] = SIZES, columns: st.SearchStrategy[int] = SIZES) -> st.SearchStrategy[Tensor]:
    """Matrices of any content, from the subnormals to what fp32 can hardly hold."""
    exponents = st.sampled_from([0, 0, 0, -120, -140, -149, 90])
    seeds = st.integers(0, 2**32 - 1)
    drawn = st.tuples(st.sampled_from(CONTENTS), rows, columns, seeds, exponents)
    return drawn.map(lambda d: torch.ldexp(content(d[0], (d[1], d[2]), d[3]).double(), torch.tensor(d[4])).float())


def magnitude(x: Float[Tensor, "*E R C"], block: Block, form: Narrow, recipe: Recipe) -> Float[Tensor, "*E R C"]:
    """|x| + f A in fp64: what rounding's error is in units of; A is the block's largest, f the recipe's floor."""
    rows, columns = x.shape[-2:]
    r, c = block[0] or max(rows, 1), block[1] or max(columns, 1)
    size = x.double().abs()
    padded = torch.nn.functional.pad(size, (0, -columns % c, 0, -rows % r))
    cut = padded.reshape(*x.shape[:-2], -(-rows // r), r, -(-columns // c), c)
    largest = cut.amax((-3, -1))
    least = (largest * recipe.floor(form)).clamp(min=form.normal * SMALLEST_SCALE)
    return size + spread(least, (r, c), (rows, columns))
