"""Wire formats: what a backend computes is what one process computes from rounded rows and gradients.

Dispatch rounds rows, and the gradients of results, to its format; combine rounds results, and the gradients of rows,
to its own; straight through. Per expert the two computations agree bit for bit. (That all are within the declared error
is a law.)
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import composeformer as cf
from composeformer import plugins
from composeformer.errors import ComposeError, SpecError
from composeformer.registry import UnknownKind
from composeformer.testing.ranks import on_ranks
from composeformer_comm import wire
from composeformer_comm.config import Collective, Local
from composeformer_comm.local import LocalExchange
from composeformer_comm.wire import Wire

few = settings(max_examples=4, deadline=None, derandomize=True)
FORMATS = [("fp8", "bf16"), ("bf16", "bf16"), ("fp8", "activations"), ("activations", "bf16")]


def rounded(value, format):
    """A value as it comes out of the wire."""
    made = Wire(format)
    return made.decode(made.encode(value, value.dtype), value.shape[1], value.dtype, value.dtype)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, format, backward):
        ctx.format = backward
        return rounded(value, format)

    @staticmethod
    def backward(ctx, gradient):
        return rounded(gradient, ctx.format), None, None


@pytest.mark.parametrize(
    ("ranks", "dispatch", "combine"), [(4, *FORMATS[0]), (2, *FORMATS[1]), (2, *FORMATS[2]), (2, *FORMATS[3])]
)
@few
@given(data=st.data())
def test_per_expert_it_is_local_around_the_rounding_bit_for_bit(lab, ranks, dispatch, combine, data):
    width = data.draw(st.sampled_from([3, 130]), label="width")
    kinds = (torch.float32, torch.bfloat16)
    cases = [data.draw(lab.cases(ranks, dtype=dtype, width=width)) for dtype in kinds]
    config = Collective(dispatch_format=dispatch, combine_format=combine)

    def around(compute):
        def inner(rows, counts):
            found = compute(Round.apply(rows, dispatch, combine), counts)
            return Round.apply(found, combine, dispatch)

        return inner

    for case, found in zip(cases, lab.spread(cases, config), strict=True):
        wanted = lab.run(LocalExchange(Local(), lab.experts), lab.inputs(case), around)
        together = lab.joined(found)
        for name, a, b in zip(wanted._fields, together[:5], wanted[:5]):
            assert torch.equal(a, b), name


def test_rounding_depends_on_no_placement(lab):
    """Rows for oneself go through the wire, too: two ranks and four give the same bits."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.rand(12, 8, generator=generator).argsort(-1)[:, :3].tolist()
    tokens = [tuple(row) for row in chosen]
    config = Collective(dispatch_format="fp8", combine_format="bf16")
    found = []
    for ranks in (2, 4):
        each = 12 // ranks
        split = tuple(tuple(tokens[r * each : (r + 1) * each]) for r in range(ranks))
        found.append(lab.joined(lab.spread([lab.case(split, 3, width=200)], config)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*(each.tensors for each in found), strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 3),
    width=st.integers(1, 300),
    format=st.sampled_from(["activations", "bf16", "fp8"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_bytes_are_as_many_as_declared_and_unpack_to_what_was_packed(rows, width, format, dtype):
    from composeformer_comm.declared import feature_bytes

    made = Wire(format)
    value = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    extra = torch.arange(rows * 3, dtype=torch.int32).view(rows, 3)
    fields = [*made.encode(value, dtype), wire.as_bytes(extra)]
    widths = made.widths(width, dtype)
    assert [each.shape[1] for each in fields[:-1]] == widths
    assert sum(widths) == sum(feature_bytes(format, width, dtype.itemsize).values())
    *parts, last = wire.unpack(wire.pack(fields), [*widths, 12])
    assert torch.equal(wire.of_bytes(last, torch.int32), extra)
    found = made.decode(parts, width, dtype, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, rounded(value, format))
    if format == "activations":
        assert torch.equal(found, value)


def test_fp8_without_its_codec_is_one_line(lab, monkeypatch):
    table = {"comm": {"kind": "collective", "dispatch_format": "fp8"}}
    whole = {**cf.Spec.load("tiny-moe").to_dict(), **table}
    assert cf.Spec.from_dict(whole).single("comm").config.dispatch_format == "fp8"
    without = plugins.load_plugins(blocked=["fp8"])
    from composeformer.spec import Spec, spec
    from composeformer.spec.document import from_data

    monkeypatch.setattr(spec, "current", lambda: without)
    with pytest.raises(SpecError) as told:
        Spec(from_data(whole))
    assert told.value.lines == (
        'python: comm.dispatch_format = "fp8": needs the codec f8-1x128, of the plugin fp8',
    )

    def build(rank):
        monkeypatch.setattr(wire, "current", lambda: without)
        wire.tiles.cache_clear()
        with pytest.raises(UnknownKind) as error:
            Wire("fp8")
        return str(error.value)

    (line,) = on_ranks(1, build)
    assert "f8-1x128" in line
    assert len(line.splitlines()) == 1
    assert issubclass(UnknownKind, ComposeError)
