"""The decoder's calls: padding, packed documents and caches in any mixture against each document alone."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.assemble import build
from composeformer.errors import InputError, PluginError
from composeformer.spec import Spec

VOCAB, LIMIT, ROWS = 31, 48, 2
MLA = {
    "kind": "mla",
    "num_heads": 2,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
}
GQA = {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2}
MIXERS = {
    "sdpa": {**GQA, "implementation": "sdpa"},
    "reference": {**GQA, "implementation": "reference"},
    "mla": {**MLA, "implementation": "auto"},
    "absorbed": {**MLA, "implementation": "absorbed"},
    "mla-reference": {**MLA, "implementation": "reference"},
}


def make(mixer, layers=2):
    """All layers but the last have a window."""
    data = {
        "model": {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "max_position_embeddings": LIMIT,
            "init_std": 0.5,
        },
        "norm": {"kind": "rmsnorm"},
        "position": {"kind": "rope"},
        "mixer": {"all": mixer, "near": {**mixer, "window": 3}},
        "ffn": {"kind": "swiglu", "intermediate_size": 12},
        "layers": [*({"mixer": "near"} for _ in range(layers - 1)), {"mixer": "all"}],
        "precision": {"kind": "full", "dtype": "float64"},
    }
    return build(Spec.from_dict(data))


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(MIXERS[name])
        return made[name]

    return get


@pytest.fixture
def model(models):
    return models("sdpa")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def runs(row):
    """The documents of a row of (token, document id): where an id changes a document starts."""
    found = []
    for place, (token, document) in enumerate(row):
        if not place or document != row[place - 1][1]:
            found.append([])
        found[-1].append(token)
    return found


def alone(model, row, last):
    """Logits of the last tokens of a row, each document by itself in a forward."""
    parts = [model(torch.tensor([tokens])).logits[0] for tokens in runs(row)]
    return torch.cat(parts)[len(row) - last :]


def chunks(tokens, packed):
    """Chunks of two rows: each place is padding or a token with a document's id."""
    ids = st.integers(0, 2) if packed else st.just(0)
    place = st.none() | st.tuples(st.integers(0, VOCAB - 1), ids)
    row = st.lists(place, min_size=tokens, max_size=tokens)
    return st.tuples(row, row)


def tensors(chunk, packed):
    """Arguments of a forward; padding has ids of token and document that must not matter."""
    ids = torch.tensor([[VOCAB - 1 if place is None else place[0] for place in row] for row in chunk])
    documents = torch.tensor([[7 if place is None else place[1] for place in row] for row in chunk])
    valid = torch.tensor([[place is not None for place in row] for row in chunk])
    return {
        "ids": ids,
        "documents": documents if packed else None,
        "valid": None if valid.all() else valid,
    }


def close(found, wanted):
    assert found.shape == wanted.shape
    if wanted.numel():
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


every = pytest.mark.parametrize("name", MIXERS)


@every
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_padding_anywhere_and_packed_documents_change_nothing(models, name, data):
    model = models(name)
    packed = data.draw(st.booleans(), label="packed")
    chunk = data.draw(chunks(data.draw(st.integers(1, 9)), packed))
    logits = model(**tensors(chunk, packed)).logits
    assert torch.isfinite(logits).all()
    for row, found in zip(chunk, logits, strict=True):
        real = [place for place in row if place is not None]
        mask = torch.tensor([place is not None for place in row])
        if real:
            close(found[mask], alone(model, real, len(real)))


@every
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_cache_equals_each_document_alone_through_any_split_padding_and_rollback(models, name, data):
    """Chunks of any size, one token at a time included; each row forgets tokens of its own, also back into an
    earlier document; rows are exchanged.
    """
    model = models(name)
    packed = data.draw(st.booleans(), label="packed")
    room = data.draw(st.integers(0, 4), label="max_rollback")
    cache = model.new_cache(ROWS, LIMIT, room)
    held, longest = [[] for _ in range(ROWS)], [0] * ROWS
    for _ in range(data.draw(st.integers(1, 5), label="chunks")):
        chunk = data.draw(chunks(data.draw(st.integers(1, 6)), packed))
        logits = model(**tensors(chunk, packed), cache=cache).logits
        assert torch.isfinite(logits).all()
        for index, row in enumerate(chunk):
            real = [place for place in row if place is not None]
            held[index] += real
            mask = torch.tensor([place is not None for place in row])
            if real:
                close(logits[index][mask], alone(model, held[index], len(real)))
        longest = [max(most, len(row)) for most, row in zip(longest, held, strict=True)]
        counts = [
            data.draw(st.integers(0, min(len(row), room - (most - len(row)))), label="forgotten")
            for most, row in zip(longest, held, strict=True)
        ]
        if data.draw(st.booleans(), label="roll back"):
            cache.rollback(torch.tensor(counts))
            held = [row[: len(row) - count] for row, count in zip(held, counts, strict=True)]
        if data.draw(st.booleans(), label="exchange"):
            cache.reorder(torch.tensor([1, 0]))
            held, longest = held[::-1], longest[::-1]
        assert cache.lengths.tolist() == [len(row) for row in held]


@every
@pytest.mark.parametrize("split", [1, 3, 5])
def test_given_positions_mean_the_same_with_and_without_a_cache(models, name, split):
    """Also where they restart or skip: they turn, and say nothing of what a query sees."""
    model = models(name)
    ids = torch.arange(20).view(2, 10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2], [5, 6, 7, 9, 30, 31, 2, 2, 2, 3]])
    wanted = model(ids, positions=positions).logits
    cache = model.new_cache(2, 10)
    pairs = zip(ids.split(split, 1), positions.split(split, 1), strict=True)
    parts = [model(part, positions=places, cache=cache).logits for part, places in pairs]
    close(torch.cat(parts, 1), wanted)
    later = ids.clone()
    later[:, 6:] += 1
    close(model(later, positions=positions).logits[:, :6], wanted[:, :6])


def test_a_document_goes_on_in_the_next_call(model):
    ids, documents = torch.arange(8)[None], torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    cache = model.new_cache(1, 8)
    model(ids[:, :4], documents=documents[:, :4], cache=cache)
    batch = model.batch(ids[:, 4:], documents=documents[:, 4:], cache=cache)
    assert batch.positions.tolist() == [[2, 3, 4, 5]]


def test_a_returning_id_is_a_new_document(model):
    ids = torch.arange(12)[None]
    again, new = torch.tensor([[0] * 4 + [1] * 4 + [0] * 4]), torch.tensor([[0] * 4 + [1] * 4 + [2] * 4])
    assert torch.equal(model(ids, documents=again).logits, model(ids, documents=new).logits)


@pytest.mark.parametrize("first", [True, False])
def test_documents_in_some_calls_alone_are_refused(model, first):
    cache, ids = model.new_cache(1, 8, 4), torch.arange(3)[None]
    given_ = {True: {"documents": ids * 0}, False: {}}
    model(ids, cache=cache, **given_[first])
    with pytest.raises(InputError, match="documents: must be given in all calls of a cache or in none"):
        model(ids, cache=cache, **given_[not first])
    cache.rollback(torch.tensor([3]))
    model(ids, cache=cache, **given_[not first])


def test_a_cache_of_another_model_is_refused(model):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"made for another model, it has nothing for layers\.2\.mixer"):
        make(GQA, layers=3)(ids, cache=model.new_cache(2, 8))
    with pytest.raises(InputError, match="made for another model, of 2 mixers and not 1"):
        make(GQA, layers=1)(ids, cache=model.new_cache(2, 8))
    with pytest.raises(InputError, match="cache: has 3 rows, the tokens have 2"):
        model(ids, cache=model.new_cache(3, 8))


def test_the_models_limit_holds_with_a_longer_cache(model):
    cache = model.new_cache(2, 200)
    ids = torch.zeros(2, 30, dtype=torch.int64)
    padding = torch.arange(30)[None] >= torch.tensor([[20], [12]])
    model(ids, cache=cache)
    model(ids, valid=padding, cache=cache)  # 60 places, but 48 tokens at most
    assert cache.lengths.tolist() == [40, 48]
    with pytest.raises(InputError, match="49 tokens with those cached exceed max_position_embeddings"):
        model(ids[:, :1], cache=cache)
    model(ids[:, :1], valid=torch.tensor([[True], [False]]), cache=cache)


INTS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"ids": [[1, 2]]}, "token ids: must be a tensor of int64 of shape (B, T), found list"),
        ({"ids": INTS.float()}, "token ids must be int64 of shape (B, T), got torch.float32 (2, 3)"),
        ({"ids": INTS[0]}, "token ids must be int64 of shape (B, T), got torch.int64 (3,)"),
        ({"ids": INTS[:, :0]}, "token ids: there are none, T is 0"),
        ({"ids": torch.tensor([[1, 2, 300]])}, "token id 300 at row 0, position 2: must be 0 to 30"),
        ({"ids": torch.tensor([[1], [-1]])}, "token id -1 at row 1, position 0: must be 0 to 30"),
        ({"valid": INTS}, "valid: must be bool of shape (2, 3), found int64 of shape (2, 3)"),
        ({"valid": INTS.float()}, "valid: must be bool of shape (2, 3), found float32 of shape (2, 3)"),
        ({"valid": INTS[:1].bool()}, "valid: must be bool of shape (2, 3), found bool of shape (1, 3)"),
        ({"valid": [[True] * 3] * 2}, "valid: must be a tensor of bool of shape (2, 3), found list"),
        ({"documents": INTS.float()}, "documents: must be integers of shape (2, 3), found float32"),
        ({"documents": INTS.bool()}, "documents: must be integers of shape (2, 3), found bool"),
        ({"positions": INTS.double()}, "positions: must be integers of shape (2, 3), found float64"),
        ({"positions": INTS[0]}, "positions: must be integers of shape (2, 3), found int64 of shape (3,)"),
        ({"positions": INTS - 1}, "position -1 at row 0, place 0: must be 0 to 47"),
        ({"positions": INTS + 48}, "position 48 at row 0, place 0: must be 0 to 47"),
        ({"phase": "bogus"}, 'phase = "bogus": must be one of train, prefill, decode'),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(model, arguments, line):
    with pytest.raises(InputError, match=re.escape(line)) as caught:
        model(**{"ids": INTS, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ((0, 4), "batch_size = 0: must be an integer >= 1"),
        ((2, 0), "max_length = 0: must be an integer >= 1"),
        ((2, 2.5), "max_length = 2.5: must be an integer >= 1"),
        ((2, 20, -1), "max_rollback = -1: must be an integer >= 0"),
        ((2, 20, True), "max_rollback = true: must be an integer >= 0"),
    ],
)
def test_a_cache_is_of_whole_numbers(model, counts, line):
    with pytest.raises(InputError, match=re.escape(line)):
        model.new_cache(*counts)


@pytest.mark.parametrize(
    "counts",
    [
        torch.tensor([1]),
        torch.tensor([[1, 1]]),
        torch.tensor(1),
        torch.tensor([1.0, 1.5]),
        torch.tensor([True, False]),
        [1, 1],
    ],
)
def test_counts_that_are_not_one_integer_per_row_are_refused_before_any_layer_changes(model, counts):
    cache = model.new_cache(2, 20, 4)
    model(INTS, cache=cache)
    with pytest.raises(InputError, match=r"rollback counts: must be .*integers of shape \(2,\)"):
        cache.rollback(counts)
    assert all(layer.lengths.tolist() == [3, 3] for layer in cache.caches.values())


@pytest.mark.parametrize("index", [torch.tensor([0, 2]), torch.tensor([-1]), torch.tensor([0.0]), [0]])
def test_a_reorder_of_rows_that_are_not_there_is_refused(model, index):
    cache = model.new_cache(2, 20)
    with pytest.raises(InputError, match="reorder index"):
        cache.reorder(index)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda *_: None, "new_cache gives a NoneType without rollback, reorder, num_bytes"),
        (lambda *_: 1 / 0, "new_cache: ZeroDivisionError"),
    ],
)
def test_a_mixer_whose_cache_is_none_is_named(made: Any, told: str) -> None:
    model = build("tiny-llama")
    model.layers[1].mixer.__dict__["new_cache"] = made
    with pytest.raises(PluginError, match=rf"plugin dense .*: mixer gqa at layers\.1\.mixer: {told}"):
        model.new_cache(1, 8)
