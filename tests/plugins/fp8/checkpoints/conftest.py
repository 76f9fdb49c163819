"""A small folder as DeepSeek-V3 was released, written without composeformer: names and shapes are transformers',
codes and scales a loop's over blocks. Its dimensions are no multiples of 128; 576 rows are those of the real `kv_a`.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from composeformer.cli import main

E4M3 = torch.float8_e4m3fn
TABLE = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 130,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 136,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
}
# transformers take a block's rows to be those of the matrix divided by its scales' (5.23), which is wrong for 192 rows.
EVEN = CONFIG | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 0,
    "vocab_size": 64,
}
# Their grouped products on a CPU want rows of whole 16 bytes.
PLAIN: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def is_coded(name: str) -> bool:
    """What the release stores as codes: projections, but for the router and what joins embeddings and states."""
    return "proj" in name and "eh_proj" not in name


def blocks(shape: tuple[int, ...]) -> list[tuple[int, int, slice, slice]]:
    """Every block of a matrix: its place among the scales, its rows and columns."""
    rows, columns = shape
    return [
        (i, j, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        for i in range(-(-rows // 128))
        for j in range(-(-columns // 128))
    ]


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales, block by block."""
    codes = torch.empty(weight.shape, dtype=E4M3)
    scales = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    for i, j, rows, columns in blocks(tuple(weight.shape)):
        block = weight[rows, columns].float()
        scales[i, j] = block.abs().max() / 448
        codes[rows, columns] = (block / scales[i, j]).to(E4M3)
    return codes, scales


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Their product in fp32, block by block, then rounded."""
    value = torch.empty(codes.shape)
    for i, j, rows, columns in blocks(tuple(codes.shape)):
        value[rows, columns] = codes[rows, columns].float() * scales[i, j].float()
    return value.to(dtype)


def tensors(config: Mapping[str, Any], coded: Callable[[str], bool] = is_coded) -> dict[str, Tensor]:
    """The released tensors of a config, with random values."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(1)
    known = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype")}
    depth = known.pop("num_nextn_predict_layers")
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**known, num_nextn_predict_layers=0))
    plain = unfused(model.state_dict(), config)
    last = config["num_hidden_layers"] - 1
    for name, value in list(plain.items()):
        start = f"model.layers.{last}."
        if depth and name.startswith(start):
            plain[f"model.layers.{last + 1}.{name.removeprefix(start)}"] = torch.randn_like(value) * 0.05
    if depth:
        hidden, new = config["hidden_size"], f"model.layers.{last + 1}."
        norms = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
        plain |= {new + norm: torch.ones(hidden) for norm in norms}
        plain[f"{new}eh_proj.weight"] = torch.randn(hidden, 2 * hidden) * 0.05
        plain[f"{new}embed_tokens.weight"] = plain["model.embed_tokens.weight"]
        plain[f"{new}shared_head.head.weight"] = plain["lm_head.weight"]
    made: dict[str, Tensor] = {}
    for name, value in plain.items():
        if coded(name):
            made[name], made[f"{name}_scale_inv"] = quantised(value)
        elif name.endswith("e_score_correction_bias"):
            made[name] = torch.randn(value.shape) * 0.1
        else:
            made[name] = value.to(torch.bfloat16).clone()
    return made


def unfused(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Experts one by one, as files hold them; transformers' modules hold stacks."""
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        start, found, kind = name.partition(".mlp.experts.")
        if not found:
            made[name] = torch.randn_like(value) * 0.05 if value.ndim > 1 else value.clone()
            continue
        for expert in range(config["n_routed_experts"]):
            piece = torch.randn_like(value[expert]) * 0.05
            named = f"{start}.mlp.experts.{expert}"
            if kind == "down_proj":
                made[f"{named}.down_proj.weight"] = piece
            else:
                gate, up = piece.chunk(2)
                made |= {f"{named}.gate_proj.weight": gate.clone(), f"{named}.up_proj.weight": up.clone()}
    return made


def write(folder: Path, found: Mapping[str, Tensor], config: Mapping[str, Any], shards: int = 1) -> Path:
    """A Hugging Face folder of these tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(dict(found), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(found)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    places = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({n: found[n] for n in names if places[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in found.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(bits(a[name]), bits(b[name])) for name in a
    )


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `compose ARGS` in this process and gives what it prints; it must end well."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["compose", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        return out

    return run


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, in three shards; nobody changes it."""
    config = {**CONFIG, "quantization_config": TABLE}
    return write(tmp_path_factory.mktemp("fp8") / "released", tensors(CONFIG), config, shards=3)


@pytest.fixture
def changed(released: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """Makes a copy whose tensors and config a function has changed."""

    def make(change: Change) -> Path:
        found, config = read(released), json.loads((released / "config.json").read_text())
        change(found, config)
        return write(tmp_path / "changed", found, config)

    return make
