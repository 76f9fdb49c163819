"""Next-token cross-entropy: the loss and its gradients are those of transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from composeformer.assemble import build
from composeformer.spec import Spec
from composeformer.tensors import Batch
from composeformer.train import TokenBatch
from composeformer_training.config import NextToken
from composeformer_training.next_token import NextTokenLoss

NAMES = {
    "model.embed_tokens": "embedding",
    "lm_head": "head.projection",
    "model.norm": "residual.norm",
    "model.layers": "layers",
    "self_attn.": "mixer.",
    "mlp.": "ffn.",
    "_proj.weight": ".weight",
    "input_layernorm": "residual.mixer_norm",
    "post_attention_layernorm": "residual.ffn_norm",
}


def ours(name: str) -> str:
    for theirs, mine in NAMES.items():
        name = name.replace(theirs, mine)
    return name


@pytest.mark.parametrize("pads", [(0, 0), (3, 5)], ids=["full", "left-padded"])
def test_loss_and_every_gradient_are_those_of_transformers(pads: tuple[int, ...]) -> None:
    sizes = {"vocab_size": 29, "hidden_size": 16, "max_position_embeddings": 32}
    data: dict[str, Any] = {
        "model": sizes,
        "norm": {"kind": "rmsnorm", "eps": 1e-5},
        "position": {"kind": "rope"},
        "mixer": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2},
        "ffn": {"kind": "swiglu", "intermediate_size": 24},
        "layers": [{"repeat": 2}],
        "precision": {"kind": "full", "dtype": "float64"},
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, **heads, intermediate_size=24, rms_norm_eps=1e-5, attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).double()
    model = build(Spec.from_dict(data))
    model.load_state_dict({ours(name): tensor for name, tensor in theirs.state_dict().items()})
    ids = torch.randint(0, 29, (2, 9), generator=torch.Generator().manual_seed(1))
    start = torch.tensor(pads)[:, None]
    valid = torch.arange(9) >= start
    # The first real token is no label of ours: nothing real precedes it.
    labels = ids.masked_fill(torch.arange(9) <= start, -100)
    judge = theirs(input_ids=ids, attention_mask=valid.long(), labels=labels)
    judge.loss.backward()
    objective, seen = NextTokenLoss(NextToken()), TokenBatch(ids, valid).seen()
    total, weight = objective(model(ids, valid=valid), Batch(*seen))
    (total / weight).backward()
    assert (total / weight).item() == pytest.approx(judge.loss.item(), rel=1e-6)  # theirs is an fp32 loss
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert len(gradients) == len(list(theirs.parameters()))
    for name, parameter in theirs.named_parameters():
        found, expected = gradients[ours(name)], parameter.grad
        assert found is not None
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6, name
