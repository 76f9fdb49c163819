"""TokenCache against a list of each row's tokens, under any sequence of appends, rollbacks and reorders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.cache import ModelCache, TokenCache
from composeformer.errors import InputError
from composeformer.tensors import Batch, visible

CPU = torch.device("cpu")


def make(rows=1, length=8, **options):
    return TokenCache({"k": (2,), "v": ()}, rows, length, device=CPU, dtype=torch.float32, **options)


def feed(cache, positions, serials, documents=None, valid=None):
    """Appends tokens whose payload is their serial number; returns what came back."""
    batch = Batch(torch.zeros_like(positions), positions, documents, valid)
    return cache.append(batch, k=serials[..., None].float().expand(*serials.shape, 2), v=serials.float())


def seen_by(cached, query, row, document, window):
    """Serial numbers that a query of one row may see, in order."""
    documents = None if document is None else torch.tensor([[document]])
    held = None if document is None else cached.documents[row : row + 1]
    mask = visible(torch.tensor([[query]]), cached.positions[row : row + 1], documents, held, window)[0, 0]
    keys, values = cached.tensors["k"][row, mask], cached.tensors["v"][row, mask]
    assert torch.equal(keys[:, 0], values)
    assert torch.equal(keys[:, 1], values)
    return sorted(values.int().tolist())


actions = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 6)),
        st.tuples(st.just("rollback"), st.lists(st.integers(0, 3), min_size=4, max_size=4)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(actions, st.none() | st.integers(1, 5), st.integers(0, 3), st.integers(6, 30))
def test_queries_see_exactly_what_a_list_of_tokens_holds(actions, window, room, length):
    """Windows, rings of any size, rows of unequal lengths: each query sees its window of its own row."""
    cache = make(2, length, window=window, max_rollback=room)
    rows, serial, longest = [[], []], 0, [0, 0]
    for action, argument in actions:
        if action == "append":
            tokens = min(argument, length - max(len(row) for row in rows))
            if not tokens:
                continue
            serials = serial + torch.arange(len(rows) * tokens).view(len(rows), tokens)
            serial += serials.numel()
            positions = torch.tensor([[len(row)] for row in rows]) + torch.arange(tokens)
            cached = feed(cache, positions, serials)
            for index, row in enumerate(rows):
                row.extend(serials[index].tolist())
                longest[index] = max(longest[index], len(row))
                for query in positions[index].tolist():
                    first = 0 if window is None else max(0, query - window + 1)
                    assert seen_by(cached, query, index, None, window) == row[first : query + 1]
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
        else:
            index = [i % len(rows) for i in argument]
            cache.reorder(torch.tensor(index))
            rows, longest = [list(rows[i]) for i in index], [longest[i] for i in index]
        assert cache.lengths.tolist() == [len(row) for row in rows]
        assert cache.bound == max(len(row) for row in rows)


def test_a_window_keeps_only_its_slots_and_those_to_roll_back():
    assert make(3, 100, window=5, max_rollback=2).tensors["k"].shape == (3, 7, 2)
    assert make(3, 100).tensors["k"].shape == (3, 100, 2)
    # A ring longer than the sequence would waste slots.
    assert make(3, 6, window=5, max_rollback=2).tensors["k"].shape == (3, 6, 2)


def test_bytes_are_those_of_the_payload():
    assert make(3, 10).num_bytes == 3 * 10 * (2 + 1) * 4


def test_a_full_cache_says_so_and_stays_as_it_was():
    cache = make(1, 4)
    feed(cache, torch.arange(3)[None], torch.arange(3)[None])
    with pytest.raises(InputError, match="3 \\+ 2 tokens exceed max_length 4"):
        feed(cache, torch.tensor([[3, 4]]), torch.tensor([[3, 4]]))
    cached = feed(cache, torch.tensor([[3]]), torch.tensor([[3]]))
    assert seen_by(cached, 3, 0, None, None) == [0, 1, 2, 3]


@pytest.mark.parametrize("counts", [[3, 0], [-1, 0], [0, 1], [0, 2]])
def test_an_impossible_rollback_is_refused_and_changes_nothing(counts):
    """More than max_rollback; fewer than none; more in two steps; more than a row has."""
    cache = make(2, 8, max_rollback=2)
    feed(cache, torch.arange(3).expand(2, 3), torch.arange(6).view(2, 3))
    cache.rollback(torch.tensor([0, 2]))
    with pytest.raises(InputError, match="cannot roll back"):
        cache.rollback(torch.tensor(counts))
    assert cache.lengths.tolist() == [3, 1]


def test_forgotten_slots_stand_at_no_position():
    cache = make(2, 8, max_rollback=3)
    feed(cache, torch.arange(5).expand(2, 5), torch.arange(10).view(2, 5))
    cache.rollback(torch.tensor([3, 1]))
    assert cache.positions[:, :5].tolist() == [[0, 1, -1, -1, -1], [0, 1, 2, 3, -1]]


def test_padding_is_seen_by_none():
    cache = make(2, 8)
    valid = torch.tensor([[False, False, True], [True, True, True]])
    cached = feed(cache, torch.tensor([[0, 0, 0], [0, 1, 2]]), torch.arange(6).view(2, 3), valid=valid)
    assert seen_by(cached, 5, 0, None, None) == [2]
    assert seen_by(cached, 5, 1, None, None) == [3, 4, 5]


def test_a_query_sees_its_own_document_alone():
    cache = make(1, 8)
    documents = torch.tensor([[7, 7, 9, 9]])
    feed(cache, torch.tensor([[0, 1, 0, 1]]), torch.arange(4)[None], documents)
    cached = feed(cache, torch.tensor([[2]]), torch.tensor([[4]]), torch.tensor([[9]]))
    assert seen_by(cached, 2, 0, 9, None) == [2, 3, 4]


def test_reads_are_no_longer_than_the_longest_row():
    cache = make(1, 1000)
    assert feed(cache, torch.arange(3)[None], torch.arange(3)[None]).tensors["k"].shape[1] == 3


def test_slots_are_finite_before_they_are_written():
    """A masked read multiplies what it must not see by zero."""
    cache = make(2, 8, window=3)
    assert all(torch.isfinite(tensor).all() for tensor in cache.tensors.values())


def test_a_model_cache_moves_all_layers_together():
    layers = {
        "layers.0.mixer": make(2, 8, max_rollback=2),
        "layers.1.mixer": make(2, 8, window=2, max_rollback=2),
    }
    cache = ModelCache(layers, 2, 8, CPU)
    positions = torch.arange(4).expand(2, 4)
    for layer in layers.values():
        feed(layer, positions, torch.arange(8).view(2, 4))
    cache.advance(Batch(positions, positions))
    cache.rollback(torch.tensor([2, 0]))
    cache.reorder(torch.tensor([1, 0, 0]))
    assert cache.lengths.tolist() == [4, 2, 2]
    assert all(layer.lengths.tolist() == [4, 2, 2] for layer in layers.values())
    assert cache.num_bytes == sum(layer.num_bytes for layer in layers.values())
    assert cache.get("layers.0.mixer") is layers["layers.0.mixer"]
    assert cache.get("layers.2.mixer") is None


def test_a_model_cache_counts_real_tokens_only():
    cache = ModelCache({}, 2, 8, CPU)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    cache.advance(Batch(ids, ids, valid=torch.tensor([[False, True, True], [True, True, True]])))
    cache.advance(Batch(ids, ids))
    assert cache.lengths.tolist() == [5, 6]
