"""A dtype takes the place of a folder's number format: codes are decoded to it."""

from pathlib import Path

import torch

from composeformer.assemble import build
from composeformer.store import load, save


def test_a_folder_of_codes_opens_in_one_dtype(tmp_path: Path) -> None:
    coded = build("tiny-deepseek-v3", overrides=("precision.kind=fp8-block", "precision.weights=float8_e4m3fn"))
    save(coded, tmp_path / "coded")
    wide = load(tmp_path / "coded", dtype="float32")
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float32}
    maps = dict(coded.named_modules())
    for role in ("layers.0.mixer.kv_b", "layers.1.ffn.up"):
        # What is multiplied is what is decoded, to the last bit.
        assert torch.equal(wide.get_submodule(role).weight, maps[role].matrix())  # type: ignore[operator]
