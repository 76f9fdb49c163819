"""Released FP8 folders open without a GPU, decoded bit by bit as a loop over blocks and as transformers decode."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import composeformer as cf
from composeformer.dialects import find
from composeformer.errors import InputError
from composeformer.store.loading import read_config
from composeformer_fp8.codec_blocks import BlocksCodec
from composeformer_fp8.configs.codec_blocks import Blocks

from .conftest import CONFIG, EVEN, PLAIN, TABLE, bits, dequantised, quantised, read, tensors, write

IDS = torch.arange(24).reshape(2, 12) * 7 % 96
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CODEC = BlocksCodec(Blocks())


def plainly(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a released folder, decoded by the loop."""
    found = read(folder)
    scales = {name: found.pop(name) for name in [*found] if name.endswith("_scale_inv")}
    return {
        name: dequantised(value, scales[f"{name}_scale_inv"], dtype) if f"{name}_scale_inv" in scales else value
        for name, value in found.items()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_weight_is_what_a_loop_over_blocks_decodes(released: Path, dtype: str) -> None:
    model = cf.load(released, weights=dtype)
    dialect = find(read_config(released))
    state = model.state_dict()
    theirs = dict(dialect.write(model.spec, state.__getitem__))
    judged = plainly(released, DTYPES[dtype])
    assert theirs.keys() == judged.keys()
    for name, value in judged.items():
        assert torch.equal(theirs[name], value.to(theirs[name].dtype)), name
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}


def test_the_router_bias_stays_fp32_and_the_rest_is_bfloat16(released: Path) -> None:
    state = cf.load(released).state_dict()
    assert {str(v.dtype) for n, v in state.items() if n.endswith("router.bias")} == {"torch.float32"}
    assert {str(v.dtype) for n, v in state.items() if not n.endswith("router.bias")} == {"torch.bfloat16"}


def test_a_dtype_asked_for_is_decoded_to_at_once_and_not_by_way_of_bfloat16(released: Path) -> None:
    name = "layers.0.mixer.kv_a.weight"
    wide = cf.load(released, dtype="float32").state_dict()[name]
    assert torch.equal(wide, cf.load(released, weights="float32").state_dict()[name])
    assert not torch.equal(wide, wide.bfloat16().float())
    narrow = cf.load(released).state_dict()[name]
    assert torch.equal(narrow, wide.bfloat16())


def test_it_computes_what_transformers_compute_with_the_decoded_weights(released: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    decoded = plainly(released, torch.float32)
    judged = {name: value.float() for name, value in decoded.items() if not name.startswith("model.layers.2.")}
    write(tmp_path / "plain", judged, {**CONFIG, "torch_dtype": "float32"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **PLAIN)
    with torch.no_grad():
        b = theirs(IDS).logits
        a = cf.load(released, dtype="float32")(IDS).logits
    assert float((a - b).abs().max() / b.abs().max()) <= 1e-5


def test_transformers_decode_the_same_folder_to_the_same_logits(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = write(tmp_path / "even", tensors(EVEN), {**EVEN, "quantization_config": TABLE}, shards=2)
    asked = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=asked, dtype=torch.float32, **PLAIN
    )
    ours = cf.load(folder, dtype="float32")
    q_a = "layers.1.mixer.q_a.weight"
    assert torch.equal(ours.state_dict()[q_a], theirs.model.layers[1].self_attn.q_a_proj.weight)
    experts = theirs.model.layers[1].mlp.experts.down_proj
    assert torch.equal(ours.state_dict()["layers.1.ffn.down.weight"], experts)
    theirs.float()  # what was no code is bfloat16 still
    with torch.no_grad():
        a, b = ours(IDS % 64).logits, theirs(IDS % 64).logits
    assert float((a - b).abs().max() / b.abs().max()) <= 1e-5


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32), st.sampled_from([*DTYPES.values()]))
def test_whole_blocks_decode_as_transformers_decode_them(r: int, c: int, seed: int, dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(seed)
    codes, scales = quantised(torch.randn(128 * r, 128 * c, generator=generator) * 10.0 ** (seed % 9 - 4))
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
    assert torch.equal(bits(CODEC.decode((codes, scales), dtype)), bits(theirs))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 300), st.integers(0, 2**32), st.sampled_from([*DTYPES.values()]))
def test_blocks_that_are_cut_decode_as_the_loop_does(r: int, c: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes, scales = quantised(torch.randn(r, c, generator=generator))
    assert torch.equal(CODEC.decode((codes, scales), dtype), dequantised(codes, scales, dtype))
    encoded = CODEC.encode(dequantised(codes, scales, torch.float32))
    assert [tuple(part.shape) for part in encoded] == [(r, c), tuple(scales.shape)]


def test_large_matrices_are_decoded_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = quantised(torch.randn(700, 150, generator=torch.Generator().manual_seed(2)))
    whole = CODEC.decode((codes, scales))
    monkeypatch.setattr("composeformer_fp8.codec_blocks.SLAB", 1)
    assert torch.equal(CODEC.decode((codes, scales)), whole)
    stack = torch.stack([codes, codes.flip(0)]), torch.stack([scales, scales.flip(0)])
    assert torch.equal(CODEC.decode(stack)[0], whole)
    assert torch.equal(CODEC.decode(stack)[1], dequantised(codes.flip(0), scales.flip(0), torch.float32))


def test_other_families_read_the_same_form(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 160,
        "intermediate_size": 200,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    found = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"})).state_dict()
    stored = {}
    for name, value in found.items():
        if name.endswith("_proj.weight"):
            stored[name], stored[f"{name}_scale_inv"] = quantised(value)
        else:
            stored[name] = value.bfloat16()
    folder = write(tmp_path / "llama", stored, {**config, "quantization_config": TABLE})
    up = "model.layers.0.mlp.up_proj.weight"
    judged = dequantised(stored[up], stored[f"{up}_scale_inv"])
    assert torch.equal(cf.load(folder).state_dict()["layers.0.ffn.up.weight"], judged)
    kept = cf.load(folder, weights="keep")
    assert torch.equal(bits(kept.state_dict()["layers.0.ffn.up.weight"]), bits(stored[up]))
    with torch.no_grad():
        assert kept(IDS % 64).logits.isfinite().all()


def test_text_is_generated_from_such_a_folder(released: Path) -> None:
    (found,) = cf.generate(cf.load(released), [[1, 2, 3]], max_new_tokens=4)
    assert len(found.ids) == 4


def test_the_command_line_generates_from_such_a_folder(released: Path, tmp_path: Path, compose: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(96)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "with_tokenizer"
    shutil.copytree(released, folder)
    made.save(str(folder / "tokenizer.json"))
    arguments = ("--prompt", "w1 w2 w3", "--max-new-tokens", 4)
    found = json.loads(compose("generate", folder, *arguments, "--json"))
    compose("import", folder, "-o", tmp_path / "ours", "--weights", "bfloat16")
    assert json.loads(compose("generate", tmp_path / "ours", *arguments, "--json")) == found
    compose("import", folder, "-o", tmp_path / "kept", "--weights", "keep")
    assert compose("generate", tmp_path / "kept", *arguments).strip()


def test_a_word_that_says_nothing_of_codes_is_refused(released: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"weights = \"bfloat\".*did you mean 'bfloat16'"):
        cf.load(released, weights="bfloat")
    with pytest.raises(InputError, match="must be one of keep, bfloat16, float32"):
        cf.import_model(released, tmp_path / "out", weights="int8")
    assert not (tmp_path / "out").exists()
