"""DeepSeek-V3's modules that predict further tokens: their tensors behind the last layer, copies and gaps.

transformers' own module judges names and logits. It ignores layer 61 when it loads a main model, whatever the
model's depth; here it is told the tiny model's layers.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from composeformer.dialects import Dialect, find
from composeformer.errors import DialectError
from composeformer.folder import WeightReader
from composeformer.spec import Spec
from composeformer.store import export_model, import_model, load, save

LAYERS, VOCABULARY = 2, 61
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
    "rope_theta": 1000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
MODULE = (
    "eh_proj.weight",
    "embed_tokens.weight",
    "enorm.weight",
    "hnorm.weight",
    "input_layernorm.weight",
    "mlp.gate.e_score_correction_bias",
    "mlp.gate.weight",
    "mlp.shared_experts.down_proj.weight",
    "mlp.shared_experts.gate_proj.weight",
    "mlp.shared_experts.up_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_a_layernorm.weight",
    "self_attn.q_a_proj.weight",
    "self_attn.q_b_proj.weight",
    "shared_head.head.weight",
    "shared_head.norm.weight",
)
COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def made(**changes: Any) -> tuple[Dialect, Spec]:
    config = CONFIG | changes
    return find(config), Spec.from_dict(find(config).to_spec(config))


def checkpoint(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """All tensors of theirs, random: those of a released file, copies included."""
    dialect, spec = made(**changes)
    generator = torch.Generator().manual_seed(seed)
    ours = {}
    for name, weight in spec.plan.tensors.items():
        noise = torch.randn(weight.shape, generator=generator)
        gain = 1.0 if "gate.weight" in name else 0.7
        flat = noise * 0.3 + (1.0 if "norm" in name else 0.0)
        ours[name] = flat if noise.ndim == 1 else noise * gain * noise.shape[-1] ** -0.5
    return dict(dialect.write(spec, ours.__getitem__))


def folder(root: Path, tensors: Mapping[str, Tensor], **changes: Any) -> Path:
    (root / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / "model.safetensors")
    return root


def behind(tensors: Mapping[str, Tensor], layer: int = LAYERS) -> set[str]:
    """The names of one module, experts left out."""
    start = f"model.layers.{layer}."
    return {n.removeprefix(start) for n in tensors if n.startswith(start) and ".experts." not in n}


class Source:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Mapping[str, Tensor]:
        return self.tensors

    def get(self, name: str, /) -> Tensor:
        return self.tensors[name]


def test_modules_are_stored_as_released() -> None:
    tensors = checkpoint(num_nextn_predict_layers=2)
    assert behind(tensors) == behind(tensors, LAYERS + 1) == set(MODULE)
    assert behind(tensors, LAYERS + 2) == set()
    experts = {
        f"model.layers.{LAYERS}.mlp.experts.{e}.{m}_proj.weight"
        for e in range(8)
        for m in ("gate", "up", "down")
    }
    assert experts <= tensors.keys()


def test_the_released_model_is_stored_in_as_many_elements() -> None:
    """684,531,386,000 on the Hub, of which 41,540,496 are the scales of its FP8 blocks; copies included."""
    spec = Spec.load("deepseek-v3")
    dialect, config = find(CONFIG), find(CONFIG).to_config(spec)
    assert config["num_nextn_predict_layers"] == 1
    total = 0
    shapes: dict[str, tuple[int, ...]] = {}
    for transfer in dialect.rules(spec):
        if transfer.kind == "move":
            shapes |= transfer.theirs.tensor_shapes()
    for transfer in dialect.rules(spec):
        if transfer.kind == "same":
            shapes |= {name: shapes[str(transfer.same_as)] for name in transfer.theirs.names}
    for shape in shapes.values():
        total += torch.Size(shape).numel()
    assert total == 684_531_386_000 - 41_540_496


@settings(max_examples=6)
@given(st.integers(1, 3), st.booleans(), st.integers(0, 9))
def test_tensors_go_there_and_back_bit_by_bit(depth: int, tied: bool, seed: int) -> None:
    changes = {"num_nextn_predict_layers": depth, "tie_word_embeddings": tied}
    dialect, spec = made(**changes)
    theirs = checkpoint(seed, **changes)
    ours = dict(dialect.read(spec, Source(theirs)))
    assert ours.keys() == spec.plan.tensors.keys()
    again = dict(dialect.write(spec, ours.__getitem__))
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_copies_may_be_absent_and_are_written_as_released_files_have_them(tied: bool) -> None:
    dialect, spec = made(tie_word_embeddings=tied)
    whole = checkpoint(tie_word_embeddings=tied)
    bare = {name: t for name, t in whole.items() if not name.endswith(tuple(f"{LAYERS}.{c}" for c in COPIES))}
    assert len(bare) == len(whole) - 2
    read = dict(dialect.read(spec, Source(bare)))
    assert all(torch.equal(read[name], t) for name, t in dialect.read(spec, Source(whole)))
    written = dict(dialect.write(spec, read.__getitem__))
    assert all(torch.equal(written[name], whole[name]) for name in whole)


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_that_differs_is_refused_by_name(copy: str) -> None:
    dialect, spec = made()
    theirs = checkpoint()
    name = f"model.layers.{LAYERS}.{copy}"
    theirs[name] = theirs[name] + 1
    with pytest.raises(DialectError, match=f"{name}: must equal .* in this model, but differs"):
        dict(dialect.read(spec, Source(theirs)))


@pytest.mark.parametrize("stated", [0, None])
def test_none_is_a_model_without(stated: int | None) -> None:
    config = CONFIG | {"num_nextn_predict_layers": stated}
    if stated is None:
        del config["num_nextn_predict_layers"]
    spec = Spec.from_dict(find(config).to_spec(config))
    assert spec.plan.predictor is None
    assert find(config).to_config(spec)["num_nextn_predict_layers"] == 0


def main_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in tensors.items() if not name.startswith(f"model.layers.{LAYERS}.")
    }


def test_modules_that_are_announced_but_not_stored_are_read_as_none_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers saves such folders: it drops the modules and keeps the key."""
    root = folder(tmp_path, main_only(checkpoint()))
    with caplog.at_level(logging.WARNING):
        model = load(root)
    assert model.predictor is None
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"num_nextn_predict_layers = 1, but nothing of model.layers.{LAYERS}. is stored: read as 0"
    ]


def test_a_module_that_is_stored_in_part_is_refused_by_name(tmp_path: Path) -> None:
    whole = checkpoint()
    for part in ("enorm", "eh_proj"):
        name = f"model.layers.{LAYERS}.{part}.weight"
        with pytest.raises(DialectError) as refused:
            load(folder(tmp_path, {n: t for n, t in whole.items() if n != name}))
        (line,) = refused.value.lines
        assert line.endswith(f"{name}: is missing")


def test_a_module_that_is_stored_but_not_announced_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, checkpoint(), num_nextn_predict_layers=0)
    with pytest.raises(DialectError, match=f"model.layers.{LAYERS}.enorm.weight: is unexpected"):
        load(root)


def test_a_module_needs_experts_in_the_last_layer() -> None:
    """Theirs always has experts; ours has what the last layer has."""
    with pytest.raises(DialectError, match="so the last layer must have them too"):
        made(first_k_dense_replace=LAYERS)
    dialect, spec = made(first_k_dense_replace=LAYERS, num_nextn_predict_layers=0)
    predicting = spec.with_(predictor={"kind": "mtp", "depth": 1})
    with pytest.raises(DialectError, match="so the last layer must have them too"):
        dialect.to_config(predicting)


def test_a_module_of_other_parts_than_the_last_layers_is_not_said() -> None:
    dialect, spec = made()
    other = {"kind": "mtp", "layer": {"mixer": "mixer", "ffn": "swiglu"}}
    with pytest.raises(DialectError, match=r"predictor\.layer"):
        dialect.to_config(spec.with_(predictor=other))


def test_folders_keep_predictor_and_biases_in_fp32_bit_by_bit(tmp_path: Path) -> None:
    """As released once dequantised: bfloat16, but for the routers' biases. Saved from a model, and converted."""
    (tmp_path / "theirs").mkdir()
    stored = {n: t if n.endswith("correction_bias") else t.bfloat16() for n, t in checkpoint().items()}
    root = folder(tmp_path / "theirs", stored)
    import_model(root, tmp_path / "ours")
    model = load(tmp_path / "ours")
    assert model.predictor.depths[0].ffn.router.bias.dtype == torch.float32
    save(model, tmp_path / "saved")
    for name in ("ours", "saved"):
        export_model(tmp_path / name, tmp_path / f"{name}-back")
        with WeightReader(tmp_path / f"{name}-back") as reader:
            assert reader.names().keys() == stored.keys()
            for tensor, wanted in stored.items():
                found = reader.get(tensor)
                assert found.dtype == wanted.dtype
                assert torch.equal(found, wanted)


def tokens(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(("depth", "tied"), [(1, False), (2, True)])
def test_logits_of_every_depth_agree_with_transformers(
    depth: int, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"num_nextn_predict_layers": depth, "tie_word_embeddings": tied}
    root = folder(tmp_path, checkpoint(depth, **changes), **changes)
    ignored = [rf"model\.layers\.{LAYERS + k}.*" for k in range(depth)]
    monkeypatch.setattr(transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", ignored)
    loader: Any = transformers.AutoModelForCausalLM
    main = loader.from_pretrained(root, attn_implementation="eager", experts_implementation="eager").eval()
    modules: Any = MtpModel
    theirs = modules.from_pretrained(main).eval()
    ids = tokens(24)
    with torch.no_grad():
        found = load(root)(ids, predict=True)
        hidden = main.model(input_ids=ids).last_hidden_state
        cache = MtpCache(config=theirs.config)
        assert len(found.predictions) == depth
        for k, prediction in enumerate(found.predictions, 1):
            positions = torch.arange(k, ids.shape[1])[None]
            hidden = theirs.forward_layer(k - 1, hidden[:, :-1], positions, cache, input_ids=ids[:, k:])
            wanted = theirs._project_to_logits(hidden)
            assert prediction.logits.shape == wanted.shape
            assert (prediction.logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
