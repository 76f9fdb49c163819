"""Codings: how an ecosystem stores weights as codes is data, for any dialect, and anybody's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from composeformer.dialects import codings, load_all, transfer
from composeformer.dialects.coding import Companion, codec, parse
from composeformer.errors import ComposeError, DialectError
from composeformer.spec import Spec

SMALL: dict[str, Any] = {
    "format": 1,
    "name": "small",
    "quant_method": "small",
    "codec": "f8-128x128",
    "companions": [{"theirs": "{module}.scale"}],
    "precision": {"kind": "fp8-block", "weights": "float8_e4m3fn"},
    "config": {"bits": {"require": 8}, "scales": {"ours": "precision.scales", "default": "float32"}},
    "plain": "skipped",
    "ignore": ["by"],
}


def changed(**changes: Any) -> str:
    return tomli_w.dumps(SMALL | changes)


def test_a_coding_reads_what_it_knows_and_says_what_it_means() -> None:
    small = parse(changed(), "small.toml")
    stated = small.read({"quant_method": "small", "bits": 8, "by": "me", "skipped": ["head", "a.*.b"]})
    assert stated.precision == {"kind": "fp8-block", "weights": "float8_e4m3fn"}
    assert stated.plain == ("head", "a.*.b")
    assert small.read({"scales": "ue8m0"}).precision["scales"] == "ue8m0"
    names = [(part.name, part.shape) for part in small.stored("m.3.up.weight", (129, 5))]
    assert names == [("m.3.up.weight", (129, 5)), ("m.3.up.scale", (2, 1))]


def test_all_that_is_wrong_in_a_table_is_told_together() -> None:
    with pytest.raises(DialectError) as caught:
        parse(changed(), "small.toml").read({"bits": 4, "skiped": [], "skipped": [1]})
    assert caught.value.lines == (
        "quantization_config.skiped = []: small does not know this field, and it could change the weights; "
        "did you mean 'skipped'?",
        "quantization_config.bits = 4: must be 8",
        "quantization_config.skipped = [1]: must be a list of module names",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("codec = ", "small.toml"),
        (changed(format=2), "format must be 1"),
        (changed(companions=3), "companions must be a list"),
        (changed(companions=[{"theirs": "scale"}]), "must have {weight} or {module} in it"),
        (changed(companions=[{"theirs": "{weight}"}]), "differ from the codes' name"),
        (changed(companions=[{"theirs": "{weight}_s", "and": 1}]), "unknown key 'and'"),
        (changed(precision={"weights": "float32"}), "precision must be a table with a kind"),
        (changed(config={"bits": {"ours": "mixer.bits"}}), "begins with one of precision"),
        (changed(config={"bits": {"ours": "num_layers"}}), "begins with one of precision"),
        (changed(surprise=1), "unknown key 'surprise'"),
        (changed(plain=[3]), "plain must be text"),
    ],
)
def test_a_slip_in_a_coding_is_told_in_one_line_with_its_place(text: str, words: str) -> None:
    with pytest.raises(DialectError, match=words) as caught:
        parse(text, "small.toml")
    assert str(caught.value).startswith("small.toml")
    assert len(caught.value.lines) == 1


def test_a_coding_that_names_other_tensors_than_its_codec_stores_is_refused() -> None:
    two = parse(changed(companions=[{"theirs": "{weight}_a"}, {"theirs": "{weight}_b"}]), "small.toml")
    with pytest.raises(DialectError, match="small names 2 tensors beside the codes, the codec f8-128x128 stores 1"):
        two.stored("x.weight", (2, 2))
    with pytest.raises(ComposeError, match="f8-64x64"):
        codec("f8-64x64")


@pytest.mark.parametrize(
    ("pattern", "module", "plain"),
    [
        ("lm_head", "lm_head", True),
        ("layers.1", "layers.1.attn", True),
        ("layers.1", "layers.11.attn", False),
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        (r"model\.layers\.\d+\.mlp", "model.layers.7.mlp.up_proj", True),
        ("model.layers.*", "model.layers.7.mlp.up_proj", True),
        ("(", "model", False),
    ],
)
def test_listed_modules_are_read_as_transformers_read_them(pattern: str, module: str, plain: bool) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    stated = parse(changed(), "small.toml").read({"skipped": [pattern]})
    assert stated.excepts(f"{module}.weight") is plain
    if pattern != "(":  # no pattern at all: they raise
        assert should_convert_module(module, [pattern]) is not plain


def test_names_beside_codes_keep_what_tells_them_apart() -> None:
    assert Companion(theirs="{weight}_scale_inv").name("a.b.weight") == "a.b.weight_scale_inv"
    assert Companion(theirs="{module}.scales").name("a.b.weight") == "a.b.scales"
    assert Companion(theirs="q.{module}").name("weight") == "q."


CODED = Spec.load("tiny-deepseek-v3").with_(precision={"kind": "fp8-block", "weights": "float8_e4m3fn"})


def deepseek() -> Any:
    return next(dialect for dialect in load_all() if dialect.name == "deepseek_v3")


def test_what_stands_beside_codes_moves_with_them() -> None:
    names = {name for each in deepseek().rules(CODED) for name in each.theirs.names}
    for name in ("model.layers.1.mlp.experts.3.up_proj", "model.layers.3.self_attn.kv_b_proj"):
        assert {f"{name}.weight", f"{name}.weight_scale_inv"} <= names
    for name in ("model.layers.1.mlp.gate", "model.layers.3.eh_proj", "lm_head", "model.norm"):
        assert f"{name}.weight" in names
        assert f"{name}.weight_scale_inv" not in names


def test_a_codec_without_names_in_an_ecosystem_is_not_said_by_its_dialects() -> None:
    whole = Spec.load("tiny-llama").with_(precision={"kind": "int8"})
    llama = next(dialect for dialect in load_all() if dialect.name == "llama")
    with pytest.raises(DialectError, match="codec int8-row, for which no dialect has names"):
        llama.to_config(whole)


def test_lines_that_reorder_elements_move_no_codes() -> None:
    spec = Spec.load("tiny-llama").with_(precision={"kind": "fp8-block", "weights": "float8_e4m3fn"})
    gguf = next(dialect for dialect in load_all() if dialect.source == "gguf")
    with pytest.raises(DialectError, match="reordered or joined, which tears blocks of codes apart; dequantise"):
        gguf.rules(spec)


def test_copies_of_a_tensor_of_codes_bring_what_stands_beside_it() -> None:
    head = {"roles": "head", "format": {"kind": "fp8-block", "weights": "float8_e4m3fn"}}
    spec = CODED.with_({"precision.rules": [head]})
    same = {t.theirs.names[0]: t.same_as for t in deepseek().rules(spec) if t.kind == "same"}
    copied = "model.layers.3.shared_head.head.weight"
    assert same[copied] == "lm_head.weight"
    assert same[f"{copied}_scale_inv"] == "lm_head.weight_scale_inv"
    values = {
        name: torch.zeros(weight.shape, dtype=getattr(torch, str(weight.dtype)))
        for name, weight in spec.formats.stored.items()
    }
    written = dict(transfer.write(deepseek().rules(spec), values.__getitem__))
    assert written[f"{copied}_scale_inv"].shape == (2, 1)


# Somebody else's format: one file, for a codec that is there already.
THIRD = """
format = 1
name = "rows"
quant_method = "row-integers"
codec = "int8-row"
companions = [{ theirs = "{module}.scales" }]
plain = "not_quantised"
[precision]
kind = "int8"
[config]
bits = { require = 8 }
"""
PLUGIN = """
from pathlib import Path
from composeformer.hookspecs import hookimpl

@hookimpl
def compose_dialects():
    return [Path(__file__).with_name("rows.toml")]
"""
USE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
import composeformer as cf
spec = cf.Spec.load("tiny-llama").with_(precision={"kind": "int8"})
model = cf.build(spec, seed=1)
assert cf.save(model, "ours") == "llama"
cf.export_model("ours", "theirs")
table = json.loads(Path("theirs/config.json").read_text())["quantization_config"]
assert table == {"quant_method": "row-integers", "bits": 8}, table
found = load_file("theirs/model.safetensors")
assert found["model.layers.0.mlp.up_proj.scales"].dtype == torch.bfloat16
kept = cf.load("theirs", weights="keep")
for name, value in model.state_dict().items():
    assert torch.equal(kept.state_dict()[name], value), name
plain = cf.load("theirs", dtype="float32").state_dict()
codes, scales = (model.state_dict()["layers.0.ffn.up." + n] for n in ("weight", "weight_scale"))
assert torch.equal(plain["layers.0.ffn.up.weight"], codes.float() * scales.float())
other = {"roles": "*.mixer", "format": {"kind": "fp8-block", "weights": "float8_e4m3fn"}}
assert cf.save(cf.build(spec.with_(precision={"rules": [other]})), "both") == "native"
try:
    cf.export_model("both", "refused")
except cf.ComposeError as error:
    assert "the codecs f8-128x128, int8-row, and quantization_config names one" in str(error), error
else:
    raise AssertionError("one config says two forms")
"""


def test_a_third_partys_format_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "rows_format").mkdir()
    (tmp_path / "rows_format" / "__init__.py").write_text("")
    (tmp_path / "rows_format" / "plugin.py").write_text(PLUGIN)
    (tmp_path / "rows_format" / "rows.toml").write_text(THIRD)
    info = tmp_path / "rows_format-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rows-format\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[composeformer]\nrows = rows_format.plugin\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_codings_of_all_plugins_are_found() -> None:
    assert "fp8-blocks" in {each.name for each in codings.load_all()}
    assert codings.of_codec("f8-128x128").quant_method == "fp8"
