"""The pre-norm residual in layers that lack a sublayer; what it computes is in the laws of residuals."""

import pytest


@pytest.mark.parametrize("layer", [{"ffn": False}, {"mixer": False}])
def test_a_layer_has_norms_only_of_the_sublayers_it_has(lab, layer):
    model = lab.model(layers=[layer])
    names = {name for name, _ in model.layers[0].residual.named_children()}
    assert names == ({"mixer_norm"} if "ffn" in layer else {"ffn_norm"})
