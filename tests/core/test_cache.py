"""TokenCache against a list of each row's tokens, under any sequence of appends, rollbacks and reorders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.cache import TokenCache
from composeformer.errors import InputError
from composeformer.model_cache import ModelCache
from composeformer.tensors import Batch

CPU = torch.device("cpu")


def make(rows=1, length=8, **options):
    return TokenCache({"k": (2,), "v": ()}, rows, length, device=CPU, dtype=torch.float32, **options)


def feed(cache, serials, documents=None, valid=None):
    """Appends tokens whose payload is their serial number; returns what came back, its mask written out."""
    batch = Batch(torch.zeros_like(serials), torch.zeros_like(serials), documents, valid)
    cached = cache.append(batch, k=serials[..., None].float().expand(*serials.shape, 2), v=serials.float())
    if cached.seen is not None:
        return cached
    queries, keys = serials.shape[1], cached.tensors["v"].shape[1]
    assert queries in (1, keys)
    return cached._replace(seen=torch.ones(1, queries, keys, dtype=torch.bool).tril(keys - queries))


def numbered(rows, tokens):
    return torch.arange(rows * tokens).view(rows, tokens)


def seen_by(cached, query, row=0):
    """Serial numbers that the new token at place `query` of a row may see, in order."""
    mask = cached.seen.expand(len(cached.tensors["v"]), -1, -1)[row, query]
    keys, values = cached.tensors["k"][row, mask], cached.tensors["v"][row, mask]
    assert torch.equal(keys[:, 0], values)
    assert torch.equal(keys[:, 1], values)
    return sorted(values.int().tolist())


actions = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=6)),
        st.tuples(st.just("append"), st.lists(st.just([True] * 4), max_size=6)),
        st.tuples(st.just("rollback"), st.lists(st.integers(0, 3), min_size=4, max_size=4)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(actions, st.none() | st.integers(1, 5), st.integers(0, 3), st.integers(6, 30))
def test_queries_see_exactly_what_a_list_of_tokens_holds(actions, window, room, length):
    """Windows, rings of any size, padding anywhere, rows of unequal lengths: each query sees its window of its
    own row.
    """
    cache = make(2, length, window=window, max_rollback=room)
    rows, serial, longest, fed = [[], []], 0, [0, 0], 0
    for action, argument in actions:
        if action == "append":
            tokens = min(len(argument), length - fed)
            if not tokens:
                continue
            fed += tokens
            valid = torch.tensor(argument[:tokens]).repeat(1, len(rows)).T[: len(rows)]
            serials = serial + numbered(len(rows), tokens)
            serial += serials.numel()
            cached = feed(cache, serials, valid=None if valid.all() else valid)
            for index, row in enumerate(rows):
                for place in range(tokens):
                    if valid[index, place]:
                        row.append(int(serials[index, place]))
                        first = 0 if window is None else max(0, len(row) - window)
                        assert seen_by(cached, place, index) == row[first:]
                longest[index] = max(longest[index], len(row))
        elif action == "rollback":
            # As many as asked for, but no deeper than the row and max_rollback allow.
            floors = [max(0, most - room) for most in longest]
            counts = [min(n, len(row) - low) for n, row, low in zip(argument, rows, floors, strict=False)]
            counts += [0] * (len(rows) - len(counts))
            if any(len(row) > low for row, low in zip(rows, floors, strict=True)):
                deeper = [len(row) - low + 1 for row, low in zip(rows, floors, strict=True)]
                with pytest.raises(InputError, match="cannot roll back"):
                    cache.rollback(torch.tensor(deeper))
            cache.rollback(torch.tensor(counts))
            for row, count in zip(rows, counts, strict=True):
                del row[len(row) - count :]
            fed = max(len(row) for row in rows)
        else:
            index = [i % len(rows) for i in argument]
            cache.reorder(torch.tensor(index))
            rows, longest = [list(rows[i]) for i in index], [longest[i] for i in index]
            fed = max(len(row) for row in rows)
        assert cache.lengths.tolist() == [len(row) for row in rows]
        assert cache.bound == fed


def test_a_window_keeps_only_its_slots_and_those_to_roll_back():
    assert make(3, 100, window=5, max_rollback=2).tensors["k"].shape == (3, 7, 2)
    assert make(3, 100).tensors["k"].shape == (3, 100, 2)
    # A ring longer than the sequence would waste slots.
    assert make(3, 6, window=5, max_rollback=2).tensors["k"].shape == (3, 6, 2)


def test_bytes_are_those_of_the_payload():
    assert make(3, 10).num_bytes == 3 * 10 * (2 + 1) * 4


def test_a_full_cache_says_so_and_stays_as_it_was():
    cache = make(1, 4)
    feed(cache, torch.arange(3)[None])
    with pytest.raises(InputError, match="3 \\+ 2 tokens exceed max_length 4"):
        feed(cache, torch.tensor([[3, 4]]))
    assert seen_by(feed(cache, torch.tensor([[3]])), 0) == [0, 1, 2, 3]


@pytest.mark.parametrize("counts", [[3, 0], [-1, 0], [0, 1], [0, 2]])
def test_an_impossible_rollback_is_refused_and_changes_nothing(counts):
    """More than max_rollback; fewer than none; more in two steps; more than a row has."""
    cache = make(2, 8, max_rollback=2)
    feed(cache, numbered(2, 3))
    cache.rollback(torch.tensor([0, 2]))
    with pytest.raises(InputError, match="cannot roll back"):
        cache.rollback(torch.tensor(counts))
    assert cache.lengths.tolist() == [3, 1]


def test_slots_tell_their_tokens():
    cache, ring = make(2, 8, max_rollback=3), make(2, 9, window=2, max_rollback=3)
    for each in (cache, ring):
        feed(each, numbered(2, 4))
        feed(each, numbered(2, 3), valid=torch.tensor([[True, False, True], [False, False, False]]))
        each.rollback(torch.tensor([3, 1]))
    assert cache.lengths.tolist() == [3, 3]
    assert cache.orders.tolist() == [list(range(8))] * 2
    assert ring.orders.tolist() == [[0, 1, 2, -2, -1]] * 2


def test_padding_is_seen_by_none_and_takes_nothing_out_of_a_window():
    cache = make(2, 20, window=3)
    feed(cache, numbered(2, 3))
    for _ in range(4):
        padding = torch.tensor([[False], [True]])
        cached = feed(cache, torch.tensor([[90], [91]]), valid=padding)
    assert seen_by(cached, 0, 1) == [91, 91, 91]
    assert seen_by(feed(cache, torch.tensor([[7], [8]])), 0, 0) == [1, 2, 7]


def test_a_query_sees_its_own_document_alone():
    cache = make(1, 8)
    feed(cache, torch.arange(4)[None], torch.tensor([[7, 7, 9, 9]]))
    assert seen_by(feed(cache, torch.tensor([[4]]), torch.tensor([[9]])), 0) == [2, 3, 4]


def test_reads_are_no_longer_than_the_longest_row():
    cache = make(1, 1000)
    feed(cache, torch.arange(3)[None])
    assert feed(cache, torch.arange(2)[None]).tensors["k"].shape[1] == 5


def test_slots_are_finite_before_they_are_written():
    """A masked read multiplies what it must not see by zero."""
    cache = make(2, 8, window=3)
    assert all(torch.isfinite(tensor).all() for tensor in cache.tensors.values())


def test_a_model_cache_moves_all_layers_together():
    layers = {
        "layers.0.mixer": make(2, 8, max_rollback=2),
        "layers.1.mixer": make(2, 8, window=2, max_rollback=2),
    }
    cache = ModelCache(layers, 2, 8, CPU, 2)
    for layer in layers.values():
        feed(layer, numbered(2, 4))
    cache.advance(numbered(2, 4))
    cache.rollback(torch.tensor([2, 0]))
    cache.reorder(torch.tensor([1, 0, 0]))
    assert cache.lengths.tolist() == [4, 2, 2]
    assert all(layer.lengths.tolist() == [4, 2, 2] for layer in layers.values())
    assert cache.num_bytes == sum(layer.num_bytes for layer in layers.values())
    assert cache.get("layers.0.mixer") is layers["layers.0.mixer"]
    assert cache.get("layers.2.mixer") is None


def test_a_model_cache_counts_real_tokens_only():
    cache, ids = ModelCache({}, 2, 8, CPU), numbered(2, 3)
    cache.advance(ids, valid=torch.tensor([[False, True, True], [True, True, True]]))
    cache.advance(ids)
    assert cache.lengths.tolist() == [5, 6]


def test_a_refused_rollback_changes_no_layer():
    layer = make(2, 8, max_rollback=3)
    cache = ModelCache({"layers.0.mixer": layer}, 2, 8, CPU, 1)
    feed(layer, numbered(2, 4))
    cache.advance(numbered(2, 4))
    with pytest.raises(InputError, match="max_rollback is 1"):
        cache.rollback(torch.tensor([2, 0]))
    assert layer.lengths.tolist() == cache.lengths.tolist() == [4, 4]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_documents_are_counted_as_if_fed_at_once(data):
    """Split anywhere and rolled back anywhere: numbers and counts are those of the tokens that are left."""
    room, valid = data.draw(st.integers(0, 4)), None
    cache, held, longest = ModelCache({}, 1, 99, CPU, room), [], 0
    for _ in range(data.draw(st.integers(1, 6))):
        new = data.draw(st.lists(st.tuples(st.integers(-1, 1), st.booleans()), min_size=1, max_size=5))
        documents = torch.tensor([[document for document, _ in new]])
        valid = torch.tensor([[real for _, real in new]])
        counted = cache.count(documents, valid)
        cache.advance(documents, documents, valid)
        for place, (document, real) in enumerate(new):
            if real:
                same = bool(held) and held[-1][0] == document
                number = held[-1][1] + (not same) if held else 0
                held.append((document, number, held[-1][2] + 1 if same else 1))
                assert tuple(int(each[0, place]) for each in counted) == held[-1]
        longest = max(longest, len(held))
        count = data.draw(st.integers(0, min(len(held), room - (longest - len(held)))))
        cache.rollback(torch.tensor([count]))
        held = held[: len(held) - count]
