"""What a folder holds, counted from a spec without torch, is what is released, and what saving writes.

Source of the released figures: the Hugging Face index of deepseek-ai/DeepSeek-V3, by dtype.
"""

import json
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest

import composeformer as cf
from composeformer.costs import Checkpoint, checkpoint
from composeformer.costs.folders import by_precision
from composeformer.dialects import find
from composeformer.folder import WeightReader
from composeformer.formats import BITS
from composeformer.spec import Spec, shipped

DATA = Path(__file__).parents[1] / "data"
RELEASED = {"kind": "fp8-block", "weights": "float8_e4m3fn"}
SCALES, ROUTER_BIAS = 41_540_496, 15_104


def test_the_released_deepseek_v3_is_counted_exactly() -> None:
    found = checkpoint(Spec.load("deepseek-v3").with_(precision=RELEASED))
    assert found.dialect == "deepseek_v3"
    assert found.elements == 684_531_386_000
    assert found.by_dtype == {
        "float8_e4m3fn": 680_571_043_840,
        "bfloat16": 3_918_786_560,
        "float32": SCALES + ROUTER_BIAS,
    }
    assert found.bytes == 688_574_839_360


def test_the_released_config_says_so_itself() -> None:
    """From its config.json alone: the architecture, the form of the weights, what they are, the same words again."""
    config = json.loads((DATA / "released_moe_configs.json").read_text())["deepseek-v3"]
    dialect = find(config)
    stated = dialect.stated(config)
    assert stated is not None
    spec = Spec.from_dict(dialect.to_spec(config)).with_({"precision": dict(stated.precision)})
    assert checkpoint(spec).bytes == 688_574_839_360
    assert dialect.to_config(spec)["quantization_config"] == config["quantization_config"]


def test_scales_of_whole_blocks_alone_would_be_fewer() -> None:
    """576 rows of `kv_a` in 62 layers: floor in place of ceil loses a row of 56 scales in each."""
    spec = Spec.load("deepseek-v3").with_(precision=RELEASED)
    scales = {n: w.shape for n, w in spec.formats.stored.items() if n.endswith("kv_a.weight_scale_inv")}
    assert set(scales.values()) == {(5, 56)}
    assert len(scales) == 62


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("tiny")])
@pytest.mark.parametrize(
    "precision",
    [{"kind": "full"}, {"kind": "full", "dtype": "bfloat16"}, {"kind": "bf16"}, RELEASED, {"kind": "int8"}],
    ids=str,
)
def test_saving_writes_what_was_counted(name: str, precision: dict[str, Any], tmp_path: Path) -> None:
    spec = Spec.load(name).with_({"precision": precision})
    counted = checkpoint(spec)
    assert counted.dialect == cf.save(cf.build(spec), tmp_path / "m")
    elements: Counter[str] = Counter()
    with WeightReader(tmp_path / "m") as reader:
        for info in reader.names().values():
            elements[str(info.dtype).removeprefix("torch.")] += prod(info.shape)
        assert counted.tensors == len(reader.names())
    assert counted.by_dtype == elements
    assert counted.bytes == sum(count * BITS[dtype] // 8 for dtype, count in elements.items())


def test_cost_tells_it_as_json_without_torch() -> None:
    code = """
import sys
from composeformer.cli import main
sys.argv = ["compose", "cost", "tiny-deepseek-v3", "--json"]
try:
    main()
finally:
    assert not {"torch", "safetensors", "numpy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = json.loads(done.stdout)["checkpoint"]
    assert found == checkpoint("tiny-deepseek-v3").to_dict()
    assert found["bytes"] == 4 * found["elements"]


def test_every_precision_has_a_folder_of_its_own_bytes() -> None:
    """The released form among them; scales are elements too, so only forms without any have as many as the model."""
    spec = Spec.load("tiny-deepseek-v3")
    found = by_precision(spec)
    released = found["fp8-block, weights = float8_e4m3fn"]
    assert released == checkpoint(spec.with_(precision=RELEASED))
    assert set(spec.registry.kinds("precision")) <= {name.partition(",")[0] for name in found}
    for name, each in found.items():
        assert isinstance(each, Checkpoint), name
        assert each.elements == sum(each.by_dtype.values())
        assert each.bytes == sum(BITS[dtype] * n // 8 for dtype, n in each.by_dtype.items())
    full, half = found["full"], found["full, dtype = bfloat16"]
    assert isinstance(full, Checkpoint)
    assert isinstance(half, Checkpoint)
    assert isinstance(released, Checkpoint)
    assert full.elements == half.elements < released.elements
    assert full.bytes - half.bytes == 2 * half.by_dtype["bfloat16"]


def test_the_command_tells_the_folder_in_every_precision() -> None:
    command = [sys.executable, "-m", "composeformer", "cost", "tiny-deepseek-v3", "--precisions", "--json"]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    told = made["sections"]["folder by precision"]
    assert told["full"]["value"] == 4 * made["checkpoint"]["elements"]
    assert "float8_e4m3fn" in told["fp8-block, weights = float8_e4m3fn"]["definition"]
