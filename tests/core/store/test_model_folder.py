"""Model folders: what is written is what is read, in every dtype, whole or not at all."""

import json
from pathlib import Path

import pytest
import tomli
import tomli_w
import torch

import composeformer as cf
from composeformer.assemble import build
from composeformer.errors import ComposeError, FolderError, InputError
from composeformer.spec import Spec
from composeformer.store import describe, load, save

IDS = torch.arange(12)[None] * 7 % 256


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_saved_model_loads_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    model = build("tiny-llama", dtype=dtype, seed=3)
    assert save(model, tmp_path / "m") == "llama"
    again = load(tmp_path / "m")
    assert equal(model, again)
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert again.spec.fingerprint == model.spec.fingerprint


def test_model_that_no_dialect_expresses_is_saved_under_its_own_names(tmp_path: Path) -> None:
    spec = Spec.load("tiny-llama", ["embedding={kind='token', scale=2.0}"])
    model = build(spec, seed=1)
    assert save(model, tmp_path / "m") == "native"
    assert not (tmp_path / "m" / "config.json").exists()
    assert equal(model, load(tmp_path / "m"))
    with pytest.raises(ComposeError, match="scale"):
        cf.export_model(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_small_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    model = build("tiny-llama", seed=5)
    save(model, tmp_path / "m", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert equal(model, load(tmp_path / "m"))


def test_same_seed_same_folder_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save(build("tiny-llama", seed=seed), tmp_path / name)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_existing_folder_is_kept_unless_replaced(tmp_path: Path) -> None:
    save(build("tiny-llama", seed=1), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(FolderError, match="m"):
        save(build("tiny-llama", seed=2), tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    save(build("tiny-llama", seed=2), tmp_path / "m", replace=True)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() != before


def test_meta_model_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="meta"):
        save(build("tiny-llama", device="meta"), tmp_path / "m")


def test_every_missing_unexpected_and_misshaped_tensor_is_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(build("tiny-llama"), tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:-1].clone()
    weights["surprise"] = torch.zeros(1)
    save_file(weights, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "manifest.json").unlink()
    (tmp_path / "m" / "compose.lock").unlink()
    (tmp_path / "m" / "spec.toml").unlink()
    with pytest.raises(ComposeError) as told:
        load(tmp_path / "m")
    text = "\n".join(told.value.lines)
    assert all(word in text for word in ("model.norm.weight", "up_proj", "surprise"))


def test_flipped_byte_is_found_by_the_manifest(tmp_path: Path) -> None:
    save(build("tiny-llama"), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    with pytest.raises(FolderError, match=r"model\.safetensors"):
        load(tmp_path / "m", check_hashes=True)
    file.write_bytes(data[:-10])
    with pytest.raises(FolderError, match=r"model\.safetensors"):
        load(tmp_path / "m")


def test_changed_spec_is_noticed_by_the_fingerprint(tmp_path: Path) -> None:
    save(build("tiny-llama"), tmp_path / "m")
    spec = Spec.load(tmp_path / "m" / "spec.toml", ["norm.rms.eps=1e-3"])
    (tmp_path / "m" / "spec.toml").write_text(spec.to_toml())
    with pytest.raises(FolderError, match="fingerprint"):
        describe(tmp_path / "m")


def test_weights_of_another_revision_are_refused_by_name(tmp_path: Path) -> None:
    save(build("tiny-llama"), tmp_path / "m")
    lock = tmp_path / "m" / "compose.lock"
    document = tomli.loads(lock.read_text())
    entry = next(e for e in document["components"] if e["kind"] == "gqa")
    assert entry["plugin"] == "dense"
    entry["revision"] += 1
    lock.write_text(tomli_w.dumps(document))
    with pytest.raises(FolderError, match="mixer gqa had revision 2"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    "damage", ["format = 2", "not toml [", 'format = 1\nfingerprint = 3\ndialect = "x"', ""]
)
def test_damaged_lock_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    save(build("tiny-llama"), tmp_path / "m")
    (tmp_path / "m" / "compose.lock").write_text(damage)
    with pytest.raises(FolderError, match=r"compose\.lock"):
        load(tmp_path / "m")


def test_folder_that_is_no_model_says_so(tmp_path: Path) -> None:
    for path, word in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "not a model folder")):
        with pytest.raises(FolderError, match=word):
            load(path)


def test_dtype_at_loading_overrides_the_stored_one(tmp_path: Path) -> None:
    save(build("tiny-llama", dtype="bfloat16"), tmp_path / "m")
    model = load(tmp_path / "m", dtype="float32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
