"""Work after a step: once, with integer totals of that part alone, outside autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from composeformer.decoder import Model
from composeformer.tensors import Aux
from composeformer.train import Run, TokenBatch, train_step, trainer
from composeformer.train.after import add_counts, after_step, path_of

from .conftest import VOCAB, counting, rows

Fresh = Callable[[], Model]


def test_a_part_is_called_once_a_step_with_its_counts_over_all_micro_batches(fresh: Fresh) -> None:
    model, batches = fresh(), [rows(2, 8, seed) for seed in range(3)]
    calls = counting(model)
    objective, optimizer = trainer(model)
    with torch.no_grad():
        model(batches[0].ids)  # looking at the model between steps counts for nothing
    results = [train_step(model, batches, objective, optimizer, step=step) for step in (7, 8)]
    assert len(calls) == 2
    real = torch.cat([b.ids[b.valid] for b in batches if b.valid is not None])
    for (totals, run, recording), result in zip(calls, results):
        assert list(totals) == ["load"]
        assert totals["load"].dtype == torch.int64
        assert torch.equal(totals["load"], torch.bincount(real, minlength=VOCAB))
        assert torch.equal(totals["load"], result.counts["layers.0.ffn.load"])
        assert (run.step, run.tokens, run.path) == (result.step, len(real), "layers.0.ffn")
        assert not recording


def test_a_part_reads_its_fields_as_scheduled(fresh: Fresh) -> None:
    model = fresh()
    calls = counting(model)
    objective, optimizer = trainer(model)
    values = {"layers.0.ffn.intermediate_size": 3.5, "layers.1.ffn.gated": 0.0}
    for given in (None, values):
        train_step(model, [rows(2, 8, 0)], objective, optimizer, step=0, values=given)
    plain, scheduled = (run for _, run, _ in calls)
    assert (plain.value("intermediate_size"), plain.value("gated")) == (16, True)
    assert (scheduled.value("intermediate_size"), scheduled.value("gated")) == (3.5, True)
    with pytest.raises(AttributeError):
        plain.value("no_such_field")


class Part(nn.Module):
    """Holds others and notes what it is told."""

    def __init__(self, told: list[tuple[str, list[str]]], **parts: nn.Module) -> None:
        super().__init__()
        self.told = told
        for name, part in parts.items():
            setattr(self, name, part)

    def after_step(self, totals: dict[str, torch.Tensor], run: Run) -> None:
        self.told.append((run.path, sorted(totals)))


def test_totals_are_named_from_the_part_and_wrappers_do_not_hide_it() -> None:
    told: list[tuple[str, list[str]]] = []
    wrapper = nn.Module()
    wrapper._orig_mod = Part(told)
    shared = Part(told)
    model = nn.ModuleDict({"a": Part(told, b=wrapper), "ab": shared, "again": shared, "other": nn.Module()})
    one = torch.ones((), dtype=torch.int64)
    after_step(
        model,
        {"a.b.load": one, "ab.load": one, "a.seen": one, "other.load": one},
        Run(step=0, tokens=1, path="", config=None),
    )
    assert told == [("a", ["b.load", "seen"]), ("a.b", ["load"]), ("ab", ["load"])]


def test_wrappers_are_no_part_of_a_path() -> None:
    assert path_of("layers.0._checkpoint_wrapped_module.mixer._orig_mod.q") == "layers.0.mixer.q"


def test_counts_are_int64_alone() -> None:
    with pytest.raises(TypeError, match=r"a\.load: counts are int64"):
        add_counts({}, Aux(counts={"a.load": torch.ones(2)}))


def test_adding_counts_leaves_what_was_returned_alone() -> None:
    first = torch.tensor([1, 2])
    totals: dict[str, torch.Tensor] = {}
    for _ in range(2):
        add_counts(totals, Aux(counts={"a.load": first}))
    assert (first.tolist(), totals["a.load"].tolist()) == ([1, 2], [2, 4])


def test_tokens_of_a_batch_without_padding_are_all_of_them() -> None:
    assert int(TokenBatch(torch.zeros(3, 5, dtype=torch.int64)).num_tokens()) == 15
