"""The pre-norm residual, the token embedding and the linear head."""

import pytest
import torch

from composeformer.tensors import NO_AUX, Aux, Output


def test_the_stream_gains_each_sublayer_of_its_norm_in_order(lab, close):
    model, x = lab.model(), lab.stream(2, 3)
    residual = model.layers[0].residual
    order = []

    def sublayer(name, factor):
        def run(y):
            order.append(name)
            return Output(y * factor)

        return run

    found = residual(
        x,
        model.batch(torch.zeros(2, 3, dtype=torch.int64)),
        {"mixer": sublayer("m", 2), "ffn": sublayer("f", 3)},
    )
    first = x + 2 * residual.mixer_norm(x)
    close(found.hidden, first + 3 * residual.ffn_norm(first))
    assert order == ["m", "f"]


def test_zero_sublayers_leave_the_stream_as_it_is(lab):
    model, x = lab.model(), lab.stream(2, 3)
    batch = model.batch(torch.zeros(2, 3, dtype=torch.int64))
    zero = {name: lambda y: Output(torch.zeros_like(y)) for name in ("mixer", "ffn")}
    assert torch.equal(model.layers[0].residual(x, batch, zero).hidden, x)


def test_side_results_of_both_sublayers_come_out(lab):
    model, x = lab.model(), lab.stream(1, 2)
    batch = model.batch(torch.zeros(1, 2, dtype=torch.int64))
    sides = {n: Aux(losses={f"layers.0.{n}.loss": torch.ones(())}) for n in ("mixer", "ffn")}
    found = model.layers[0].residual(x, batch, {n: lambda y, a=a: Output(y, a) for n, a in sides.items()})
    assert set(found.aux.losses) == {"layers.0.mixer.loss", "layers.0.ffn.loss"}
    none = {name: lambda y: Output(y) for name in ("mixer", "ffn")}
    assert model.layers[0].residual(x, batch, none).aux == NO_AUX


def test_a_wide_sublayer_does_not_widen_the_stream(lab):
    model = lab.model(precision={"kind": "bf16"})
    x, batch = lab.stream(1, 2, dtype=torch.bfloat16), model.batch(torch.zeros(1, 2, dtype=torch.int64))
    wide = {name: lambda y: Output(y.float()) for name in ("mixer", "ffn")}
    assert model.layers[0].residual(x, batch, wide).hidden.dtype == torch.bfloat16


def test_the_ends_are_the_identity_and_the_last_norm(lab):
    model, x = lab.model(), lab.stream(1, 2)
    assert model.residual.open(x) is x
    assert torch.equal(model.residual.close(x), model.residual.norm(x))


@pytest.mark.parametrize("layer", [{"ffn": False}, {"mixer": False}])
def test_a_layer_has_norms_only_of_the_sublayers_it_has(lab, layer):
    model = lab.model(layers=[layer])
    names = {name for name, _ in model.layers[0].residual.named_children()}
    assert names == ({"mixer_norm"} if "ffn" in layer else {"ffn_norm"})


def test_an_embedding_is_a_scaled_row(lab):
    model = lab.model(embedding={"kind": "token", "scale": 3.0})
    ids = torch.tensor([[0, 5, 5, 23]])
    assert torch.equal(model.embedding(ids), model.embedding.weight[ids] * 3.0)


def test_a_head_scales_then_caps(lab, close):
    model = lab.model(head={"kind": "linear", "scale": 0.5, "cap": 2.0})
    x = lab.stream(1, 3)
    logits = model.head(x)
    close(logits, 2.0 * torch.tanh(0.25 * x @ model.head.projection.weight.T))
    assert logits.abs().max() < 2.0


def test_a_tied_head_is_the_embedding(lab, close):
    model = lab.model(model={"tie_embeddings": True})
    assert model.head.projection.weight is model.embedding.weight
    out = model(torch.tensor([[1, 2, 3]]))
    close(out.logits, out.hidden @ model.embedding.weight.T)
    out.logits.sum().backward()
    untied = lab.model()
    assert (
        sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in model.parameters())
        == 24 * lab.hidden
    )
