"""Folders larger than memory are gone through: one shard that is read, one that is written, and a constant."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from composeformer.folder import WeightReader

from .conftest import E4M3, TABLE, write

HIDDEN, INNER, LAYERS = 768, 2560, 12
SHARD = 2**24  # of what is written
# A matrix in bfloat16 (4 MB), what decoding needs (slabs of 2^17 elements, in fp32), headers, and what the allocator
# and Python keep for themselves.
CONSTANT = 2**25
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "quantization_config": TABLE,
}
PROGRAM = f"""
import json, sys
import torch
torch.set_num_threads(1)
import composeformer as cf

# The peak that getrusage tells outlives exec, and would be that of the tests.
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

small, large, out, weights = sys.argv[1:]
if weights == "load":
    cf.load(small)
    before = peak()
    size = sum(value.nbytes for value in cf.load(large).state_dict().values())
else:
    cf.import_model(small, out + "/small", weights=weights)
    before, size = peak(), 0
    cf.import_model(large, out + "/large", weights=weights, max_shard_bytes={SHARD})
print(json.dumps([peak() - before, size]))
"""


def layer(index: int, hidden: int, inner: int) -> dict[str, torch.Tensor]:
    """A layer's tensors: codes, scales, and norms."""
    shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    made: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in shapes.items():
        full = f"model.layers.{index}.{name}.weight"
        made[full] = torch.full((rows, columns), 0x38, dtype=torch.uint8).view(E4M3)
        made[f"{full}_scale_inv"] = torch.full((-(-rows // 128), -(-columns // 128)), 0.01)
    norms = ("input_layernorm", "post_attention_layernorm")
    return made | {f"model.layers.{index}.{n}.weight": torch.ones(hidden, dtype=torch.bfloat16) for n in norms}


def sharded(folder: Path, layers: int, hidden: int, inner: int) -> tuple[Path, list[int]]:
    """A folder with a shard for each layer, written one at a time; the shards' sizes."""
    ends = {name: torch.zeros(64, hidden, dtype=torch.bfloat16) for name in ("lm_head", "model.embed_tokens")}
    last = {f"{n}.weight": v for n, v in ends.items()} | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    config = {**CONFIG, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    write(folder, last, config)
    (folder / "model.safetensors").rename(folder / "model-last.safetensors")
    places = dict.fromkeys(last, "model-last.safetensors")
    for index in range(layers):
        file = f"model-{index}.safetensors"
        found = layer(index, hidden, inner)
        save_file(found, folder / file)
        places |= dict.fromkeys(found, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder, [path.stat().st_size for path in folder.glob("*.safetensors")]


def measured(*arguments: object) -> tuple[int, int]:
    """By how many bytes the peak of a process grows, and the size of the model that it holds in the end."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, size = json.loads(done.stdout)
    return grown, size


@pytest.mark.parametrize("weights", ["bfloat16", "keep"])
def test_import_needs_no_more_than_a_shard_of_each_side(tmp_path: Path, weights: str) -> None:
    small, _ = sharded(tmp_path / "small", 1, 128, 128)
    large, sizes = sharded(tmp_path / "large", LAYERS, HIDDEN, INNER)
    grown, _ = measured(small, large, tmp_path / "out", weights)
    written = sum(path.stat().st_size for path in (tmp_path / "out" / "large").glob("*.safetensors"))
    bound = max(sizes) + SHARD + CONSTANT
    assert sum(sizes) + written > 2 * bound, "the folders are too small to tell"
    assert 0 < grown <= bound


def test_a_decoded_model_takes_its_own_room_and_a_shard(tmp_path: Path) -> None:
    small, _ = sharded(tmp_path / "small", 1, 128, 128)
    large, sizes = sharded(tmp_path / "large", LAYERS, HIDDEN, INNER)
    grown, size = measured(small, large, tmp_path / "out", "load")
    assert sum(sizes) > 2 * (max(sizes) + CONSTANT), "the folder is too small to tell"
    assert size <= grown <= size + max(sizes) + CONSTANT


def test_a_reader_of_one_file_maps_no_other(tmp_path: Path) -> None:
    folder, _ = sharded(tmp_path / "m", 3, 128, 256)
    with WeightReader(folder, one_file=True) as one, WeightReader(folder) as every:
        assert one.names() == every.names()
        held = []
        for name in every.names():
            held.append(one.get(name))
            assert len(one._handles) == 1
            assert torch.equal(held[-1].view(torch.uint8), every.get(name).view(torch.uint8))
        assert torch.equal(held[0].view(torch.uint8), every.get(next(iter(every.names()))).view(torch.uint8))
    with pytest.raises(ValueError, match="closed"):
        one.get(name)
