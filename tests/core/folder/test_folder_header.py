"""A damaged or crafted safetensors file is refused in one line that names it; what is merely odd is read."""

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.errors import FolderError
from composeformer.folder import WeightReader, write_shards
from composeformer.folder.dtypes import FORMATS
from composeformer.folder.header import read_header

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = struct.pack("<2f", 1, 2)


def raw(header: object, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(**changes: object) -> bytes:
    return raw({"a": {**F32, **changes}})


GOOD = raw({"a": F32})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4000000000\n"

CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes, too short"),
    "seven bytes": (b"1234567", "too short"),
    "git lfs pointer": (POINTER, "git lfs pull"),
    "error page": (b"<!DOCTYPE html><html>not found</html>", "announce a header"),
    "header over the limit": (struct.pack("<Q", 100_000_001) + b"{}", "100,000,001"),
    "header past the end": (struct.pack("<Q", 1000) + b"{}", "expected at least 1,008 bytes"),
    "truncated data": (
        GOOD[:-1],
        f"expected {len(GOOD)} bytes, found {len(GOOD) - 1}: probably an interrupted",
    ),
    "trailing bytes": (GOOD + b"x", f"expected {len(GOOD)} bytes, found {len(GOOD) + 1}"),
    "no header": (raw(b"", b""), "not with '{'"),
    "leading space": (raw(b" " + json.dumps({"a": F32}).encode()), "starts with ' '"),
    "array": (raw(b"[]", b""), "starts with '\\['"),
    "not utf-8": (raw(b'{"\xff":1}', b""), "UTF-8"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}", b""), "not with '{'"),
    "not json": (raw(b"{", b""), "not valid JSON"),
    "nan": (raw(b'{"a":NaN}', b""), "NaN is not JSON"),
    "nested deeply": (raw(b'{"a":' + b"[" * 200_000, b""), "nested too deeply"),
    "long number": (raw(b'{"a":' + b"1" * 5000 + b"}", b""), "not valid JSON"),
    "duplicate tensor": (raw(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2)), "'a' occurs twice"),
    "duplicate field": (
        raw(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
        "'dtype' occurs twice",
    ),
    "metadata not a table": (raw({"__metadata__": 1, "a": F32}), "__metadata__"),
    "metadata not texts": (raw({"__metadata__": {"x": 1}, "a": F32}), "__metadata__"),
    "entry not a table": (raw({"a": 1}), "exactly dtype"),
    "field missing": (raw({"a": {"dtype": "F32", "shape": [2]}}), "exactly dtype"),
    "field unknown": (tensor(extra=1), "exactly dtype"),
    "dtype unknown": (tensor(dtype="F33"), "unknown dtype 'F33'; did you mean"),
    "dtype not a text": (tensor(dtype=["F32"]), "unknown dtype"),
    "dtype torch lacks": (tensor(dtype="F6_E2M3"), "torch has no dtype for F6_E2M3"),
    "negative size": (tensor(shape=[-2]), "shape"),
    "fractional size": (tensor(shape=[2.0]), "shape"),
    "true as a size": (tensor(shape=[True]), "shape"),
    "shape not a list": (tensor(shape="22"), "shape"),
    "many dimensions": (tensor(shape=[1] * 65), "at most 64"),
    "huge size": (tensor(shape=[2**62, 2**62]), "larger than any tensor"),
    "huge but empty": (tensor(shape=[0, 2**63 - 1], data_offsets=[0, 0]), "larger than any tensor"),
    "size mismatch": (tensor(shape=[3]), "takes 12 bytes, data_offsets give 8"),
    "half a byte": (tensor(dtype="F4", shape=[3]), "whole bytes"),
    "odd packed rows": (tensor(dtype="F4", shape=[2, 3], data_offsets=[0, 3]), "whole bytes"),
    "falling offsets": (tensor(data_offsets=[8, 0]), "rising"),
    "three offsets": (tensor(data_offsets=[0, 8, 8]), "rising"),
    "overlap": (raw({"a": F32, "b": F32}), "safetensors: "),
    "hole": (raw({"a": {**F32, "data_offsets": [8, 16]}}, DATA * 2), "safetensors: "),
    "surrogate": (raw(b'{"\\ud800":%b}' % json.dumps(F32).encode()), "safetensors: "),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_each_corruption_is_one_line_with_file_and_cause(case: str, tmp_path: Path) -> None:
    data, told = CORRUPT[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(FolderError, match=told) as error:
        WeightReader(tmp_path)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 500 + len(str(path))


ODD: dict[str, bytes] = {
    "no tensors": raw({}, b""),
    "name like a path": raw({"../../x": F32}),
    "unaligned header": raw(json.dumps({"a": F32}).encode() + b" " * 3),
    "not a number": raw({"a": F32}, struct.pack("<2I", 0x7FC0_1234, 0xFFFF_FFFF)),
    "tensors out of order": raw({"b": {**F32, "data_offsets": [8, 16]}, "a": F32}, DATA * 2),
    "an empty tensor": raw({"a": {**F32, "shape": [0, 3], "data_offsets": [0, 0]}}, b""),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_only_odd_is_read(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(ODD[case])
    before = sorted(tmp_path.parent.rglob("*"))
    data = ODD[case][8 + int.from_bytes(ODD[case][:8], "little") :]
    with WeightReader(tmp_path) as reader:
        found = [reader.get(name).reshape(-1).view(torch.uint8) for name in reader.names()]
    assert b"".join(bytes(tensor.tolist()) for tensor in found) == data
    assert sorted(tmp_path.parent.rglob("*")) == before


def check_clear(error: FolderError, path: Path) -> None:
    assert len(str(error).splitlines()) == 1
    assert str(error).startswith(str(path))


def mutations() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    def change(at: float, kind: str, byte: int) -> Callable[[bytes], bytes]:
        def apply(data: bytes) -> bytes:
            place = int(at * len(data))
            if kind == "flip" and data:
                return data[:place] + bytes([data[place] ^ byte]) + data[place + 1 :]
            if kind == "cut":
                return data[:place]
            return data[:place] + bytes([byte]) + data[place:]

        return apply

    where = st.floats(0, 1, exclude_max=True)
    return st.builds(change, where, st.sampled_from(["flip", "cut", "insert"]), st.integers(1, 255))


@given(st.lists(mutations(), min_size=1, max_size=3))
@settings(max_examples=80, deadline=None)
def test_any_mutation_reads_fully_or_is_one_clear_error(changes: list[Callable[[bytes], bytes]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.tensor(3)}
        write_shards(folder, state.items())
        path = folder / "model.safetensors"
        data = path.read_bytes()
        for change in changes:
            data = change(data)
        path.write_bytes(data)
        try:
            with WeightReader(folder) as reader:
                for key, info in reader.names().items():
                    found = reader.get(key)
                    assert (found.dtype, tuple(found.shape)) == (info.dtype, info.shape)
        except FolderError as error:
            check_clear(error, path)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.text(max_size=4)
    | st.sampled_from(list(FORMATS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(FORMATS)) | VALUES,
        "shape": st.lists(st.integers(0, 4), max_size=3) | VALUES,
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)) | VALUES,
    }
)


@given(st.dictionaries(st.text(max_size=3), ENTRIES | VALUES, max_size=3), st.integers(0, 16))
@settings(max_examples=80, deadline=None)
def test_any_header_reads_fully_or_is_one_clear_error(header: dict[str, Any], size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        path.write_bytes(raw(header, bytes(size)))
        try:
            with WeightReader(Path(name)) as reader:
                assert all(tuple(reader.get(key).shape) == info.shape for key, info in reader.names().items())
        except FolderError as error:
            check_clear(error, path)


def test_every_format_of_the_library_is_known(tmp_path: Path) -> None:
    for name, row in FORMATS.items():
        if row.dtype is None:
            continue
        path = tmp_path / "x.safetensors"
        path.write_bytes(tensor(dtype=name, shape=[64 // row.bits]))
        assert read_header(path)["a"].format is row
    path.write_bytes(raw({"a": {**F32, "dtype": "NEW"}}))
    with pytest.raises(FolderError, match="unknown dtype 'NEW'"):
        read_header(path)
    # The library's own list, from its answer to a name that nobody knows.
    from safetensors import SafetensorError, safe_open

    with pytest.raises(SafetensorError) as error:
        safe_open(path, framework="pt")
    listed = {word for word in str(error.value).split("`")[3::2] if word.isupper() or "_" in word}
    assert listed - {"NEW"} <= set(FORMATS)
    assert len(listed) > 10
