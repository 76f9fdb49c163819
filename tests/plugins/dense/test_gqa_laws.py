"""The laws of every mixer, for both implementations of gqa, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

VARIANTS = {
    "multi-head": {"num_heads": 2},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "qkv_bias": True, "o_bias": True},
    "multi-query": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 6, "qk_norm": "norm"},
    "window": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 2, "window": 3, "qkv_bias": True},
    "capped": {"num_heads": 2, "cap": 2.0, "sinks": True, "window": 4},
}
CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}")
    for name in VARIANTS
    for implementation in ("sdpa", "reference")
    if (name, implementation) != ("capped", "sdpa")
]
BOUND = 1e-12

cases = pytest.mark.parametrize(("variant", "implementation"), CASES)
quick = settings(max_examples=5, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def models(lab):
    made = {}

    def get(variant, implementation):
        if (variant, implementation) not in made:
            mixer = {"kind": "gqa", "implementation": implementation, **VARIANTS[variant]}
            made[variant, implementation] = lab.model(mixer=mixer)
        return made[variant, implementation]

    return get


@cases
@quick
@given(tokens=st.integers(2, 9), data=st.data())
def test_a_later_token_changes_no_earlier_output(lab, models, variant, implementation, tokens, data):
    model = models(variant, implementation)
    changed = data.draw(st.integers(1, tokens - 1))
    x = lab.stream(2, tokens)
    y = x.clone()
    y[:, changed:] = lab.stream(2, tokens - changed, seed=1) * 10
    a, b = lab.mix(model, x), lab.mix(model, y)
    assert (a[:, :changed] - b[:, :changed]).abs().max() <= BOUND * a.abs().max()
    assert not torch.equal(a[:, changed:], b[:, changed:])


@cases
def test_rows_are_independent(lab, close, models, variant, implementation):
    model, x = models(variant, implementation), lab.stream(3, 7)
    close(lab.mix(model, x)[1:2], lab.mix(model, x[1:2]), BOUND)


@cases
@quick
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=5), rollback=st.integers(0, 3))
def test_cached_equals_full_for_any_split(lab, close, models, variant, implementation, chunks, rollback):
    """Prefill in one chunk or several, decoding token by token, and all between; any ring size."""
    model, x = models(variant, implementation), lab.stream(2, sum(chunks))
    with torch.no_grad():
        full = lab.mix(model, x)
        cache = model.layers[0].mixer.new_cache(2, sum(chunks), rollback)
        parts = [lab.mix(model, part, cache=cache) for part in x.split(chunks, 1)]
    close(torch.cat(parts, 1), full, BOUND)


@cases
@quick
@given(data=st.data(), head=st.integers(1, 8), tail=st.integers(1, 4), room=st.integers(1, 4))
def test_rolled_back_rows_go_on_as_if_never_fed(
    lab, close, models, variant, implementation, data, head, tail, room
):
    """Each row forgets its own number of tokens, then all go on from where they are."""
    model = models(variant, implementation)
    wrong = data.draw(st.integers(1, room), label="tokens fed")
    counts = torch.tensor(
        data.draw(st.lists(st.integers(0, wrong), min_size=3, max_size=3), label="forgotten")
    )
    x, y, z = lab.stream(3, head), lab.stream(3, wrong, seed=1), lab.stream(3, tail, seed=2)
    with torch.no_grad():
        cache = model.layers[0].mixer.new_cache(3, head + wrong + tail, room)
        lab.mix(model, x, cache=cache)
        lab.mix(model, y, cache=cache)
        cache.rollback(counts)
        found = [lab.mix(model, part, cache=cache) for part in z.split(1, 1)]
        for row, count in enumerate(counts.tolist()):
            kept = torch.cat([x[row], y[row, : wrong - count], z[row]])[None]
            close(torch.cat(found, 1)[row], lab.mix(model, kept)[0, -tail:], BOUND)


@cases
def test_left_padding_changes_nothing_even_when_it_is_nan(lab, close, models, variant, implementation):
    model, x = models(variant, implementation), lab.stream(2, 9)
    x[0, :4], x[1, :1] = torch.nan, torch.nan
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :4], valid[1, :1] = False, False
    y = lab.mix(model, x, valid=valid)
    assert torch.isfinite(y).all()
    for row, start in ((0, 4), (1, 1)):
        close(y[row, start:], lab.mix(model, x[row : row + 1, start:])[0], BOUND)


@cases
def test_padding_reaches_no_gradient(lab, close, models, variant, implementation):
    """NaN in padding, and a cotangent on its outputs, change no gradient but that of the output bias."""
    model, x = models(variant, implementation), lab.stream(1, 6)
    padded = torch.cat([torch.full((1, 3, lab.hidden), torch.nan, dtype=x.dtype), x], 1)
    valid = torch.arange(9)[None] >= 3
    cotangent = lab.stream(1, 9, seed=3)
    wanted = lab.gradients(model, lambda x: lab.mix(model, x), x, cotangent[:, 3:])
    found = lab.gradients(model, lambda x: lab.mix(model, x, valid=valid), padded, cotangent)
    assert not found["input"][:, :3].any()
    real = {"output": found["output"][:, 3:], "input": found["input"][:, 3:]}
    ignored = "layers.0.mixer.o.bias"
    found, wanted = ({k: g for k, g in each.items() if k != ignored} for each in ({**found, **real}, wanted))
    close(found, wanted, BOUND)


@cases
def test_left_padded_prefill_then_decoding_equals_each_row_alone(lab, close, models, variant, implementation):
    model, x = models(variant, implementation), lab.stream(2, 9)
    starts = (4, 1)
    valid = torch.arange(6)[None] >= torch.tensor(starts)[:, None]
    positions = (torch.arange(9)[None] - torch.tensor(starts)[:, None]).clamp(min=0)
    prompt = x[:, :6].masked_fill(~valid[..., None], torch.nan)
    with torch.no_grad():
        cache = model.layers[0].mixer.new_cache(2, 9, 1)
        parts = [lab.mix(model, prompt, positions=positions[:, :6], valid=valid, cache=cache)]
        parts += [
            lab.mix(model, x[:, t : t + 1], positions=positions[:, t : t + 1], cache=cache) for t in (6, 7, 8)
        ]
        for row, start in enumerate(starts):
            close(torch.cat(parts, 1)[row, start:], lab.mix(model, x[row : row + 1, start:])[0], BOUND)


@cases
@quick
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_packed_documents_do_not_see_each_other(lab, close, models, variant, implementation, lengths):
    model, x = models(variant, implementation), lab.stream(1, sum(lengths))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    packed = lab.mix(model, x, documents=documents).split(lengths, 1)
    for found, document in zip(packed, x.split(lengths, 1), strict=True):
        close(found, lab.mix(model, document), BOUND)


@cases
def test_documents_stay_apart_through_a_cache(lab, close, models, variant, implementation):
    model, x = models(variant, implementation), lab.stream(2, 10)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 2, 2]])
    with torch.no_grad():
        cache = model.new_cache(2, 10)
        parts = []
        for start, end in ((0, 3), (3, 7), (7, 8), (8, 9), (9, 10)):
            parts.append(lab.mix(model, x[:, start:end], cache=cache, documents=documents[:, start:end]))
    close(torch.cat(parts, 1), lab.mix(model, x, documents=documents).detach(), BOUND)


def unwritten(cache):
    """Slots that hold no token of their row."""
    return (cache.orders < 0) | (cache.orders >= cache.lengths[:, None])


@cases
@quick
@given(data=st.data(), packed=st.booleans(), room=st.integers(0, 2))
def test_padding_anywhere_through_a_cache_changes_nothing(
    lab, close, models, variant, implementation, data, packed, room
):
    """Any chunks, NaN in the padding: each document is as alone, and no window loses a token to padding."""
    model, x, tokens = models(variant, implementation), lab.stream(2, 10), 10
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    valid = torch.tensor([data.draw(flags, label="real") for _ in range(2)])
    documents = torch.tensor([data.draw(flags, label="starts") for _ in range(2)]).cumsum(1) * packed
    chunks = data.draw(st.lists(st.integers(1, 6), min_size=10, max_size=10), label="chunks")
    x = x.masked_fill(~valid[..., None], torch.nan)
    with torch.no_grad():
        cache, parts, start = model.new_cache(2, tokens, room), [], 0
        for size in chunks:
            part = slice(start, min(start := start + size, tokens))
            if x[:, part].shape[1]:
                told = {"valid": valid[:, part], "documents": documents[:, part] if packed else None}
                parts.append(lab.mix(model, x[:, part], cache=cache, **told))
        for row, found in enumerate(torch.cat(parts, 1)):
            for document in documents[row].unique():
                own = valid[row] & (documents[row] == document)
                if own.any():
                    close(found[own], lab.mix(model, x[row, own][None])[0], BOUND)


@cases
def test_garbage_in_unwritten_slots_changes_nothing(lab, close, models, variant, implementation):
    model, x = models(variant, implementation), lab.stream(2, 6)
    valid = torch.tensor([[False, True, True], [True, True, True]])
    positions = torch.tensor([[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
    found = []
    with torch.no_grad():
        for garbage in (0.0, 1e30):
            cache = model.layers[0].mixer.new_cache(2, 12, 2)
            for tensor in cache.tensors.values():
                tensor.fill_(garbage)
            parts = [lab.mix(model, x[:, :3], positions=positions[:, :3], valid=valid, cache=cache)]
            parts += [
                lab.mix(model, x[:, t : t + 1], positions=positions[:, t : t + 1], cache=cache)
                for t in (3, 4)
            ]
            cache.rollback(torch.tensor([2, 0]))
            cache.rollback(torch.tensor([0, 1]))
            for tensor in cache.tensors.values():
                tensor[unwritten(cache)] = garbage
            positions_now = torch.tensor([[2], [4]])
            parts.append(lab.mix(model, x[:, 5:], positions=positions_now, cache=cache))
            found.append(torch.cat(parts, 1))
    close(found[1], found[0], BOUND)
