"""Next-token cross-entropy: which tokens have labels; the loss and its gradients are transformers'."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from composeformer.assemble import build
from composeformer.spec import Spec
from composeformer.tensors import Batch, ModelOutput
from composeformer.train import TokenBatch
from composeformer_training.config import NextToken
from composeformer_training.next_token import IGNORE, NextTokenLoss

V = 11


@st.composite
def batches(draw: st.DrawFn) -> TokenBatch:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def numbers(below: int) -> Tensor:
        return torch.randint(0, below, (rows, length), generator=random)

    valid = draw(st.sampled_from([None, numbers(4) > 0, numbers(2) > 1]))
    documents = draw(st.sampled_from([None, numbers(2).cumsum(1)]))
    return TokenBatch(numbers(V), valid, documents)


def outputs(batch: TokenBatch, dtype: torch.dtype = torch.float64) -> ModelOutput:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(*batch.ids.shape, V, generator=random).to(dtype).requires_grad_()
    return ModelOutput(logits, logits)


@given(batches())
def test_a_label_is_the_next_token_where_both_are_real_and_of_one_document(batch: TokenBatch) -> None:
    labels = NextTokenLoss(NextToken()).labels(batch.seen())
    ids, valid, documents, _ = batch
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            learnt = t + 1 < ids.shape[1]
            learnt = learnt and (valid is None or bool(valid[row, t] and valid[row, t + 1]))
            learnt = learnt and (documents is None or bool(documents[row, t] == documents[row, t + 1]))
            assert labels[row, t] == (ids[row, t + 1] if learnt else IGNORE)


@settings(deadline=None)
@given(batches(), st.none() | st.integers(1, 9))
def test_the_sum_and_its_gradient_are_those_of_each_label_alone(batch: TokenBatch, chunk: int | None) -> None:
    objective, out = NextTokenLoss(NextToken(chunk_tokens=chunk)), outputs(batch)
    labels = objective.labels(batch.seen())
    total, weight = objective(out, batch.seen())
    total.backward()  # type: ignore[no-untyped-call]
    gradient = out.logits.grad
    alone = torch.zeros((), dtype=torch.float64)
    leaf = out.logits.detach().clone().requires_grad_()
    for row, t in (labels != IGNORE).nonzero().tolist():
        alone = alone + cross_entropy(leaf[row, t], labels[row, t])
    torch.testing.assert_close(total, alone, rtol=1e-12, atol=1e-12)
    assert int(weight) == int(objective.weight(batch.seen())) == int((labels != IGNORE).sum())
    expected = torch.zeros_like(leaf)
    if weight:
        (expected,) = torch.autograd.grad(alone, leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_no_label_is_a_zero_with_zero_gradients() -> None:
    batch = TokenBatch(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool))
    out = outputs(batch)
    total, weight = NextTokenLoss(NextToken())(out, batch.seen())
    total.backward()  # type: ignore[no-untyped-call]
    assert (total.item(), int(weight)) == (0.0, 0)
    assert torch.equal(out.logits.grad, torch.zeros_like(out.logits))


def test_the_loss_of_narrow_logits_is_computed_in_fp32() -> None:
    batch = TokenBatch(torch.arange(9)[None])
    out = outputs(batch, torch.bfloat16)
    total, _ = NextTokenLoss(NextToken())(out, batch.seen())
    wide, _ = NextTokenLoss(NextToken())(ModelOutput(out.logits.float(), out.hidden), batch.seen())
    assert total.dtype == torch.float32
    assert torch.equal(total, wide)


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
