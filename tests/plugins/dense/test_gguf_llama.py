"""GGUF's llama: a file as llama.cpp's converter writes it computes what the model in transformers does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from composeformer.assemble import fill, skeleton
from composeformer.dialects import find
from composeformer.dialects.factors import Factors
from composeformer.errors import DialectError
from composeformer.gguf import open_gguf
from composeformer.spec import Spec

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def model(**changes: Any) -> Any:
    made: Any = transformers
    config = made.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        attn_implementation="eager",
        **changes,
    )
    torch.manual_seed(1)
    return made.LlamaForCausalLM(config).eval()


def converted(name: str, tensor: Tensor) -> tuple[str, Any]:
    """A tensor's name and numbers as llama.cpp stores them: rows of rotated heads in pairs (2i, 2i + 1)."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in ends:
        return f"{ends[stem]}.{kind}", tensor.numpy()
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
    if heads:
        tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return f"blk.{layer}.{NAMES[part]}.{kind}", np.ascontiguousarray(tensor.numpy())


def write(path: Path, theirs: Any, extra: dict[str, Any] | None = None, divisors: Any = None) -> Path:
    config = theirs.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_file_type(0)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    for key, value in (extra or {}).items():
        kind: dict[type, Any] = {
            str: writer.add_string,
            float: writer.add_float32,
            int: writer.add_uint32,
            bool: writer.add_bool,
        }
        kind[type(value)](key, value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, np.float32))
    for name, tensor in theirs.state_dict().items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            writer.add_tensor(*converted(name, tensor.detach()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> tuple[Spec, dict[str, Tensor]]:
    with open_gguf(path) as file:
        dialect = find(file.metadata)
        shapes = {name: info.shape for name, info in file.names().items()}
        spec = Spec.from_dict(dialect.to_spec(file.metadata, shapes, file.get))
        return spec, dict(dialect.read(spec, file))


LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 16,
}


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True, "attention_bias": True}, {}),
        ({"head_dim": 12}, {"llama.attention.key_length": 12, "llama.attention.value_length": 12}),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, LINEAR),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            YARN,
        ),
        (
            {"rope_parameters": LLAMA3, "head_dim": 32},
            {"llama.attention.key_length": 32, "llama.attention.value_length": 32},
        ),
    ],
    ids=["plain", "tied-biased", "wide-heads", "linear", "yarn", "llama3"],
)
def test_a_gguf_file_computes_what_transformers_does(
    changes: dict[str, Any], extra: dict[str, Any], tmp_path: Path
) -> None:
    theirs = model(**changes)
    divisors = None
    if theirs.config.rope_parameters["rope_type"] == "llama3":
        plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
        divisors = (plain / theirs.model.rotary_emb.inv_freq).tolist()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    spec, tensors = read(write(tmp_path / "m.gguf", theirs, extra, divisors))
    ours = skeleton(spec)
    fill(ours, tensors.items(), "cpu")
    ids = torch.randint(0, 40, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(input_ids=ids).logits
    assert float((a - b).abs().max() / b.abs().max()) <= 1e-5
    state = theirs.state_dict()
    for layer in range(2):
        for name in ("q", "k", "v", "o"):
            theirs_name = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            assert torch.equal(tensors[f"layers.{layer}.mixer.{name}.weight"], state[theirs_name])
    assert spec.plan.layers[0]["residual"].children["mixer_norm"].part.config.eps == 1e-5


@pytest.mark.parametrize(
    ("extra", "divisors", "words"),
    [
        ({"llama.expert_count": 8}, None, "llama.expert_count = 8: must be 0"),
        ({"llama.attn_logit_softcapping": 30.0}, None, "attn_logit_softcapping"),
        ({"llama.rope.scaling.type": "longrope"}, None, "must be one of"),
        (LINEAR | {"llama.rope.scaling.attn_factor": 2.0}, None, "attn_factor"),
        ({}, [1.0, 1.0, 1.0, 7.0], "rope_freqs.weight: divisor"),
        ({}, [1.0, float("nan"), 1.0, 1.0], "rope_freqs.weight: divisor"),
        (LINEAR, [1.0, 1.0, 1.0, 1.0], "which is meant"),
    ],
)
def test_what_could_change_the_model_is_refused_by_name(
    extra: dict[str, Any], divisors: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(DialectError, match=words):
        read(write(tmp_path / "m.gguf", model(), extra, divisors))


RELEASED = Factors(
    theirs="rope_freqs.weight",
    ours="mixer.position",
    kind="llama3",
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


@given(st.sampled_from([8.0, 16.0, 32.0]), st.sampled_from([64, 80, 128]), st.sampled_from([1e4, 5e5, 1e6]))
def test_the_factor_is_read_off_the_divisors(factor: float, width: int, theta: float) -> None:
    config = transformers.LlamaConfig(
        head_dim=width,
        max_position_embeddings=131072,
        rope_parameters=LLAMA3 | {"factor": factor, "rope_theta": theta},
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    plain = theta ** -(torch.arange(0, width, 2) / width)
    fields = RELEASED.fields((plain / rotary.inv_freq).tolist(), theta)
    assert fields["mixer.position.factor"] == factor
