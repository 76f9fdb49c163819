"""swiglu and its variants: formulas with gradients."""

import pytest
import torch
from torch.nn import functional as F

from composeformer.errors import SpecError

FORMULAS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}
variants = pytest.mark.parametrize("activation", FORMULAS)


def built(lab, **fields):
    """The model, and its ffn as a function of x."""
    model = lab.model(ffn={"kind": "swiglu", "intermediate_size": 20, **fields})

    def run(x, **batch):
        ids = torch.zeros(x.shape[:2], dtype=torch.int64)
        return model.layers[0].ffn(x, model.batch(ids, **batch)).hidden

    return model, run


@variants
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_its_formula_with_gradients(lab, close, activation, gated, bias):
    model, run = built(lab, activation=activation, gated=gated, bias=bias)
    ffn, act = model.layers[0].ffn, FORMULAS[activation]

    def affine(linear, x):
        return F.linear(x, linear.weight, linear.bias)

    def formula(x):
        up = affine(ffn.up, x)
        return affine(ffn.down, act(affine(ffn.gate, x)) * up if gated else act(up))

    assert (ffn.gate is not None) == gated
    assert (ffn.down.bias is not None) == bias
    x = lab.stream(2, 5)
    close(lab.gradients(model, run, x), lab.gradients(model, formula, x))


def test_it_equals_transformers_llama(lab, close):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    model, run = built(lab)
    theirs = LlamaMLP(
        LlamaConfig(hidden_size=lab.hidden, intermediate_size=20, num_attention_heads=2)
    ).double()
    state = {n.replace(".", "_proj."): p for n, p in model.layers[0].ffn.state_dict().items()}
    theirs.load_state_dict(state)
    x = lab.stream(2, 5)
    close(run(x), theirs(x))


def test_an_unknown_activation_is_refused_with_the_nearest(lab):
    with pytest.raises(
        SpecError, match=r"must be one of silu, gelu, gelu_tanh, relu, relu2; did you mean 'silu'\?"
    ):
        lab.spec(ffn={"kind": "swiglu", "intermediate_size": 4, "activation": "silo"})
