"""Initial values: each tensor draws from (seed, name, group) alone, whatever else the model holds."""

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.assemble import build
from composeformer.contracts import Constant, Normal, Weight
from composeformer.errors import InputError
from composeformer.init import initial
from composeformer.spec import Spec

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=8), SHAPES, st.integers(-(2**70), 2**70), st.floats(1e-3, 10))
def test_a_value_is_a_function_of_seed_and_name(
    name: str, shape: tuple[int, ...], seed: int, std: float
) -> None:
    weight = Weight(name="w", shape=shape, init=Normal(std))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, again = initial(name, weight, seed, 1.0), initial(name, weight, seed, 2.0)
    assert torch.equal(one, again)
    assert (one.dtype, tuple(one.shape)) == (torch.float32, shape)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, initial(name, weight, seed + 1, 1.0))
    assert not torch.equal(one, initial(name + "x", weight, seed, 1.0))


@given(st.integers(1, 4), st.integers(1, 4))
def test_a_group_does_not_depend_on_how_many_there_are(few: int, more: int) -> None:
    stacks = [initial("e", Weight(name="e", shape=(n, 3, 2)), 0, 1.0) for n in (few, few + more)]
    assert torch.equal(stacks[0], stacks[1][:few])
    assert len({tuple(group.flatten().tolist()) for group in stacks[1]}) == few + more


def test_what_states_no_initial_value_takes_the_models() -> None:
    bare = Weight(name="w", shape=(400, 300))
    stated = Weight(name="w", shape=(400, 300), init=Normal(0.5))
    assert torch.equal(initial("a", bare, 0, 0.5), initial("a", stated, 0, 9.0))
    assert initial("a", bare, 0, 0.5).std().item() == pytest.approx(0.5, rel=0.01)
    assert abs(initial("a", bare, 0, 0.5).mean().item()) < 0.01


@pytest.mark.parametrize(
    ("dtype", "built"), [(None, torch.float32), ("int64", torch.int64), ("bool", torch.bool)]
)
def test_a_constant_is_everywhere(dtype: str | None, built: torch.dtype) -> None:
    value = initial("a", Weight(name="w", shape=(2, 3), dtype=dtype, init=Constant(1.0)), 0, 0.5)
    assert value.dtype == built
    assert bool((value == 1).all())


def test_a_layers_values_do_not_depend_on_the_layers_around_it() -> None:
    """Projections into the stream are scaled by depth; their draws are the same."""
    models = [build("tiny-llama", seed=3, overrides=[f"layers.0.repeat={n}"]).state_dict() for n in (2, 3)]
    for name in models[0]:
        short, long = (model[name] for model in models)
        if name.endswith((".o.weight", ".down.weight")):
            torch.testing.assert_close(short * sqrt(2 * 2), long * sqrt(2 * 3), rtol=1e-5, atol=0)
        else:
            assert torch.equal(short, long), name


def test_equal_seeds_give_equal_models_and_others_do_not() -> None:
    one, same, other = (build("tiny-llama", seed=seed).state_dict() for seed in (1, 1, 2))
    drawn = [name for name in one if one[name].ndim > 1]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    values = {name: one[name].flatten()[:8].tolist() for name in drawn if name != "head.projection.weight"}
    assert len({tuple(value) for value in values.values()}) == len(values)


def test_a_dtype_rounds_the_same_values() -> None:
    wide, narrow = build("tiny-llama").state_dict(), build("tiny-llama", dtype="bfloat16").state_dict()
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in wide)


def test_init_std_scales_what_it_should() -> None:
    one = build("tiny-llama").state_dict()
    two = build(Spec.load("tiny-llama").with_({"model.init_std": 0.04})).state_dict()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value if value.ndim == 1 else 2 * value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_process_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    weight = Weight(name="w", shape=(40, 3))
    one = initial("w", weight, 0, 0.02)
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        again = initial("w", weight, 0, 0.02)
        model = build("tiny-llama")
    finally:
        torch.set_default_dtype(old)
    assert again.dtype == torch.float32
    assert torch.equal(one, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), build("tiny-llama").parameters()))


@pytest.mark.parametrize("shape", [(2**40, 64, 64), (2**40, 2**10), (2**40, 2**40, 2**40)])
def test_what_is_too_large_is_refused_before_any_of_it_is_drawn(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"e: [\d,]+ bytes are more than this machine can allocate"):
        initial("e", Weight(name="e", shape=shape), 0, 1.0)
