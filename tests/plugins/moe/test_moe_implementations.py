"""The implementations of moe against each other, and what they read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import composeformer as cf
from composeformer_moe.batched import blocks

quick = settings(max_examples=25, deadline=None, derandomize=True)
# fp32 sums of up to 12 products through three maps; bfloat16 keeps eight bits of each.
BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-5}
CASES = [
    ("batched", torch.float64),
    ("grouped", torch.float32),
    ("batched", torch.float32),
    ("grouped", torch.bfloat16),
    ("batched", torch.bfloat16),
]
cases = pytest.mark.parametrize(("name", "dtype"), CASES)


def one(lab, name, dtype=torch.float64, seed=0, router="sigmoid-bias", **ffn):
    precision = {"kind": "full", "dtype": str(dtype).removeprefix("torch.")}
    table = {"intermediate_size": 8, "implementation": name, **ffn}
    return lab.model(router, seed, ffn=table, precision=precision, model={"hidden_size": 16})


def twins(lab, name, dtype, seed=0, **more):
    """A model of an implementation, and the float64 reference with the very same weights."""
    model, reference = one(lab, name, dtype, seed, **more), one(lab, "reference", seed=seed, **more)
    reference.load_state_dict(model.state_dict())
    return model, reference


@pytest.fixture
def poisoned():
    """What PyTorch leaves as it found it holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


LOADS = {
    "even": [2, 2, 2, 2, 2, 2, 2, 2],
    "some empty": [3, 0, 0, 7, 1, 0, 2, 0],
    "all on one": [0, 0, 0, 0, 13, 0, 0, 0],
    "all on the first": [40, 0, 0, 0, 0, 0, 0, 0],
    "all on the last": [0, 0, 0, 0, 0, 0, 0, 9],
    "one row": [0, 0, 1, 0, 0, 0, 0, 0],
    "none": [0] * 8,
}


@cases
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("load", LOADS)
def test_any_load_with_rows_of_nobody_that_hold_nan(lab, poisoned, name, dtype, load, spare):
    """Gradients too: an expert without rows gets zeros, a row without an expert gives and gets zeros."""
    counts = torch.tensor(LOADS[load])
    used = int(counts.sum())
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(used + spare, 16, generator=generator).to(dtype)
    cotangent = torch.randn(used + spare, 16, generator=generator).to(dtype)
    rows[used:], cotangent[used:] = torch.nan, torch.nan
    found = {}
    for key, model in zip(("found", "wanted"), twins(lab, name, dtype)):
        ffn = model.layers[0].ffn
        x = (rows if key == "found" else rows.double()).clone().requires_grad_()
        y = ffn.experts(x, counts)
        weights = [ffn.gate.weight, ffn.up.weight, ffn.down.weight]
        gradients = torch.autograd.grad(y, [x, *weights], cotangent.to(y.dtype))
        found[key] = dict(zip(("y", "x", "gate", "up", "down"), (y.detach(), *gradients)))
    for key in ("y", "x"):
        assert found["found"][key].shape == rows.shape
        assert not found["found"][key][used:].any()
    for key in ("gate", "up", "down"):
        assert not found["found"][key][counts == 0].any()
    lab.close({k: v.double() for k, v in found["found"].items()}, found["wanted"], BOUNDS[dtype])


@cases
def test_a_whole_layer_is_the_reference_within_rounding(lab, poisoned, name, dtype):
    model, reference = twins(lab, name, dtype)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    valid = torch.arange(9) >= torch.tensor([[3], [0]])
    loads = []
    for each, stream in ((model, x), (reference, x.double())):
        loads.append(lab.run(each, stream, valid).aux.counts["layers.0.ffn.router.load"])
    assert torch.equal(*loads)
    found = {key: each.double() for key, each in lab.gradients(model, x, valid).items()}
    lab.close(found, lab.gradients(reference, x.double(), valid), 4 * BOUNDS[dtype])


@cases
def test_nothing_is_read_on_the_host(lab, name, dtype):
    """Shapes alone suffice: no count, and no synchronisation, for each expert or for all."""
    model = cf.build(one(lab, name, dtype).spec, device="meta")
    x = torch.empty(2, 9, 16, dtype=dtype, device="meta", requires_grad=True)
    valid = torch.empty(2, 9, dtype=torch.bool, device="meta")
    y, aux = lab.run(model, x, valid)
    (y.sum() + sum(aux.losses.values())).backward()
    assert y.shape == x.grad.shape == x.shape
    assert aux.counts["layers.0.ffn.router.load"].shape == (8,)


@pytest.mark.parametrize(("name", "dtype"), [("grouped", torch.float32), ("batched", torch.float64)])
def test_it_compiles_whole(lab, poisoned, name, dtype):
    model = one(lab, name, dtype)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    valid = torch.arange(5) >= torch.tensor([[2], [0]])
    wanted = lab.gradients(model, x, valid)
    ffn = model.layers[0].ffn
    model.layers[0].ffn = torch.compile(ffn, backend="aot_eager", fullgraph=True)
    found = {name.replace("._orig_mod", ""): each for name, each in lab.gradients(model, x, valid).items()}
    model.layers[0].ffn = ffn
    lab.close(
        {k: v.double() for k, v in found.items()}, {k: v.double() for k, v in wanted.items()}, BOUNDS[dtype]
    )


@quick
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=12), spare=st.integers(0, 5))
def test_blocks_hold_every_row_once_with_its_own_expert_in_bounded_memory(counts, spare):
    rows, experts = sum(counts) + spare, len(counts)
    expert_N, slot_M, size = blocks(torch.tensor(counts), rows)
    assert len(expert_N) <= 2 * experts
    assert len(expert_N) * size <= 2 * max(rows, experts)
    assert len(expert_N) <= rows
    used = slot_M[: sum(counts)]
    assert used.unique().numel() == len(used)
    owners = torch.repeat_interleave(torch.arange(experts), torch.tensor(counts))
    assert torch.equal(expert_N[used // size], owners)
    assert (slot_M[sum(counts) :] == len(expert_N) * size).all()


class Rescaled(nn.Module):
    """What a precision policy may make of a map: its weight is not what it multiplies by."""

    bias = None

    def __init__(self, inner):
        super().__init__()
        self.weight, self.dtype = inner.weight, inner.dtype

    def matrix(self):
        return self.weight.sin() * torch.linspace(0.5, 2, self.weight.shape[1])[:, None]

    def forward(self, x, offsets):
        stops = [0, *offsets.tolist(), len(x)]
        parts = [x[a:b] @ m.T for a, b, m in zip(stops, stops[1:], [*self.matrix(), self.matrix()[0] * 0])]
        return torch.cat(parts)


def test_what_a_policy_multiplies_by_is_followed_with_gradients(lab):
    results = []
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    for name in ("reference", "grouped", "batched"):
        model = one(lab, name, torch.float32)
        plain = lab.run(model, x).hidden.detach()
        ffn = model.layers[0].ffn
        for each in ("gate", "up", "down"):
            setattr(ffn, each, Rescaled(getattr(ffn, each)))
        results.append(lab.gradients(model, x))
        assert (results[-1]["output"] - plain).abs().max() > 0.1 * plain.abs().max()
    for found in results[1:]:
        lab.close(found, results[0], 1e-5)


def test_the_grouped_product_is_chosen_where_it_serves(lab):
    for dtype, width, chosen in (
        ("float32", 8, "grouped"),
        ("bfloat16", 8, "grouped"),
        ("float16", 8, "grouped"),
        ("float64", 8, "batched"),
        ("float32", 6, "batched"),
        ("bfloat16", 4, "batched"),
    ):
        spec = lab.spec(
            model={"hidden_size": 16},
            ffn={"intermediate_size": width},
            precision={"kind": "full", "dtype": dtype},
        )
        choices = cf.build(spec, device="meta").choices["layers.0.ffn"]
        assert set(choices.values()) == {chosen}


@pytest.mark.parametrize(("dtype", "width"), [("float64", 8), ("float32", 6)])
def test_asking_for_the_grouped_product_where_it_does_not_serve_is_refused_with_the_reason(lab, dtype, width):
    ffn = {"intermediate_size": width, "implementation": "grouped"}
    spec = lab.spec(model={"hidden_size": 16}, ffn=ffn, precision={"kind": "full", "dtype": dtype})
    with pytest.raises(cf.errors.SpecError, match=r"takes no float64|intermediate_size is 6"):
        cf.build(spec, device="meta")
