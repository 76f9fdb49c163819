"""What is written is what is read, for any names, dtypes, shapes, shard sizes; equal in, equal out."""

import gc
import itertools
import json
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from composeformer.errors import FolderError
from composeformer.folder import WeightReader, write_shards
from composeformer.folder.dtypes import BY_DTYPE, FORMATS

NAMES = st.one_of(
    st.sampled_from(["../../x", "/etc/passwd", "a.b.weight", "", "é\u2028", 'quote"\\', "\x00\x1f", "😀"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits of any dtype, NaN payloads among them; 0-d, empty, strided and expanded ones too."""
    dtype = draw(st.sampled_from(sorted(BY_DTYPE, key=str)))
    packed = BY_DTYPE[dtype].packed > 1
    shape = draw(st.lists(st.integers(0, 4), min_size=1 if packed else 0, max_size=4))
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    tensor = (raw & 1 if dtype == torch.bool else raw).view(dtype).reshape(shape)
    if packed:
        return tensor
    if tensor.ndim > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(2, *tensor.shape)
    return tensor


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(st.dictionaries(NAMES, tensors(), max_size=6), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_what_is_read(state: dict[str, Tensor], max_shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_shards(folder, state.items(), max_shard_bytes=max_shard_bytes)
        assert sorted(files) == sorted(contents(folder))
        with WeightReader(folder) as reader:
            assert set(reader.names()) == set(state)
            for key, tensor in state.items():
                info, found = reader.names()[key], reader.get(key)
                assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert bits(found) == bits(tensor)
                assert info.file in files


@given(st.dictionaries(NAMES, tensors(), max_size=5), st.dictionaries(NAMES, NAMES, max_size=4))
@settings(max_examples=30, deadline=None)
def test_the_library_reads_what_is_written_aligned(state: dict[str, Tensor], notes: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, state.items(), metadata=notes)
        path = folder / "model.safetensors"
        found = load_file(path)
        data = path.read_bytes()
    assert {key: (value.dtype, bits(value)) for key, value in found.items()} == {
        key: (value.dtype, bits(value)) for key, value in state.items()
    }
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt", **notes}
    assert all(row["data_offsets"][0] * 8 % FORMATS[row["dtype"]].bits == 0 for row in header.values())


@given(st.dictionaries(NAMES, tensors(), max_size=5), st.integers(1, 100))
@settings(max_examples=20, deadline=None)
def test_equal_input_gives_equal_bytes(state: dict[str, Tensor], max_shard_bytes: int) -> None:
    notes = {letter: letter for letter in "zxay"}
    found = []
    for metadata in (notes, dict(reversed(notes.items()))):
        with tempfile.TemporaryDirectory() as name:
            write_shards(Path(name), state.items(), max_shard_bytes=max_shard_bytes, metadata=metadata)
            found.append(contents(Path(name)))
    assert found[0] == found[1]


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_shards_are_full_but_never_over_the_limit(sizes: list[int], limit: int) -> None:
    state = {f"t{place:02d}": torch.zeros(size, dtype=torch.uint8) for place, size in enumerate(sizes)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_shards(folder, state.items(), max_shard_bytes=limit)
        with WeightReader(folder) as reader:
            place = {key: reader.names()[key].file for key in state}
        weights = [file for file in files if file.endswith(".safetensors")]
        if len(weights) > 1:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert index == {"metadata": {"total_size": sum(sizes)}, "weight_map": place}
            assert weights == [
                f"model-{n:05d}-of-{len(weights):05d}.safetensors" for n in range(1, len(weights) + 1)
            ]
        else:
            assert files == ["model.safetensors"]
    held = [[len(state[key]) for key in state if place[key] == file] for file in weights]
    assert all(sum(shard) <= limit or len(shard) == 1 for shard in held)
    assert all(sum(shard) + following[0] > limit for shard, following in itertools.pairwise(held))


def test_memory_holds_one_shard_and_the_next_tensor(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for place in range(24):
            tensor = torch.full((10,), place, dtype=torch.uint8)
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"t{place}", tensor
            del tensor

    gc.disable()
    try:
        write_shards(tmp_path, stream(), max_shard_bytes=40)
    finally:
        gc.enable()
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    assert most == 5


def test_shared_memory_is_written_once_per_name(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    write_shards(tmp_path, [("head", weight), ("embedding", weight), ("row", weight[1])])
    with WeightReader(tmp_path) as reader:
        assert torch.equal(reader.get("head"), weight)
        assert torch.equal(reader.get("embedding"), weight)
        assert reader.get("row").tolist() == [3.0, 4.0, 5.0]


def test_parameters_and_lazy_views_are_written_by_value(tmp_path: Path) -> None:
    number = torch.tensor([1 + 2j], dtype=torch.complex64)
    write_shards(tmp_path, [("p", torch.nn.Parameter(torch.ones(2))), ("conj", number.conj())])
    with WeightReader(tmp_path) as reader:
        assert reader.get("p").tolist() == [1.0, 1.0]
        assert reader.get("conj").tolist() == [1 - 2j]


def test_progress_counts_every_tensor_and_byte(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    state = {"a": torch.zeros(3), "b": torch.zeros(5, dtype=torch.bfloat16)}
    write_shards(
        tmp_path, state.items(), max_shard_bytes=12, progress=lambda name, size: told.append((name, size))
    )
    assert told == [("a", 12), ("b", 10)]


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], "'a' is given twice"),
        ([("__metadata__", torch.zeros(1))], "__metadata__"),
        ([("a\ud800", torch.zeros(1))], "not valid Unicode"),
        ([("a", torch.zeros(1, dtype=torch.complex128))], "torch.complex128"),
        ([("a", torch.zeros(1, device="meta"))], "meta"),
        ([("a", torch.zeros(2).to_sparse())], "sparse"),
    ],
)
def test_what_the_format_can_not_hold_is_refused_by_name(
    tmp_path: Path, state: list[tuple[str, Tensor]], told: str
) -> None:
    with pytest.raises(FolderError, match=told) as error:
        write_shards(tmp_path, state)
    assert len(error.value.lines) == 1


def test_existing_weights_are_not_overwritten(tmp_path: Path) -> None:
    write_shards(tmp_path, [("a", torch.zeros(1))])
    before = contents(tmp_path)
    with pytest.raises(FolderError, match="already holds weights"):
        write_shards(tmp_path, [("b", torch.zeros(1))])
    assert contents(tmp_path) == before


def test_slices_read_a_part_and_writing_to_a_tensor_changes_no_file(tmp_path: Path) -> None:
    write_shards(tmp_path, [("a", torch.arange(12).reshape(3, 4))])
    before = contents(tmp_path)
    reader = WeightReader(tmp_path)
    assert reader.get_slice("a")[1:, :1].tolist() == [[4], [8]]
    tensor = reader.get("a")
    reader.close()
    tensor.zero_()
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="closed"):
        reader.get("a")


def test_get_moves_to_the_device(tmp_path: Path) -> None:
    write_shards(tmp_path, [("a", torch.zeros(2, 3))])
    with WeightReader(tmp_path) as reader:
        assert reader.get("a", "meta").device == torch.device("meta")
