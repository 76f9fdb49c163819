"""Parts of a folder read alone, experts or rows or columns, are what the whole has there: no block is misplaced."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import composeformer as cf
from composeformer.folder import WeightReader
from composeformer.store.accounting import lookup
from composeformer.store.decoding import Decoded, Held
from composeformer.store.loading import opened
from composeformer_fp8.codec_blocks import BlocksCodec
from composeformer_fp8.configs.codec_blocks import Blocks

from .conftest import bits, dequantised, quantised, read

CODEC = BlocksCodec(Blocks())
STACKS = ("layers.1.ffn.gate.weight", "layers.1.ffn.down.weight", "predictor.depths.0.ffn.up.weight")


class Rows:
    """A folder's reader over tensors in memory, which notes how much of each was read."""

    folder = Path("here")

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.read: dict[str, list[tuple[int, ...]]] = {}

    def names(self) -> Mapping[str, Tensor]:
        return self.tensors

    def get_slice(self, name: str) -> Any:
        outer = self

        class View:
            def __getitem__(self, index: Any) -> Tensor:
                found = outer.tensors[name][index]
                outer.read.setdefault(name, []).append(tuple(found.shape))
                return found

        return View()


def decoded(codes: Tensor, scales: Tensor) -> tuple[Decoded, Rows]:
    rows: Any = Rows({"w": codes, "w_scale_inv": scales})
    parts = Blocks().stored(_weight(codes))
    return Decoded(rows, {"w": Held("f8-128x128", parts)}, torch.float32), rows


def _weight(codes: Tensor) -> Any:
    from composeformer.contracts import Weight

    return Weight(name="w", shape=tuple(codes.shape))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 9), st.integers(1, 300), st.sampled_from([-2, -1]))
@example(576, 8, 130, -2)  # kv_a over 8 ranks: 72 rows each
@example(2688, 64, 3, -2)
@example(129, 2, 1, -1)
def test_even_shards_at_any_number_of_ranks_make_the_whole(size: int, ranks: int, other: int, dim: int) -> None:
    shape = (size, other) if dim == -2 else (other, size)
    codes, scales = quantised(torch.randn(shape, generator=torch.Generator().manual_seed(size)))
    whole = dequantised(codes, scales, torch.float32)
    source, _ = decoded(codes, scales)
    each = -(-size // ranks)
    edges = [(min(rank * each, size), min((rank + 1) * each, size)) for rank in range(ranks)]
    shards = [source.cut("w", dim, start, stop) for start, stop in edges if start < stop]
    assert torch.equal(torch.cat(shards, dim), whole)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.data())
def test_any_rows_are_those_of_the_whole(rows: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, rows), min_size=2, max_size=9)))
    codes, scales = quantised(torch.randn(rows, 140, generator=torch.Generator().manual_seed(rows)))
    whole = dequantised(codes, scales, torch.float32)
    source, notes = decoded(codes, scales)
    for start, stop in pairwise(cuts):
        assert torch.equal(source.cut("w", -2, start, stop), whole[start:stop])
        # No more is read than the rows from the edge of their first block on, and the scales of these blocks.
        assert notes.read["w"][-1][0] == stop - start // 128 * 128
        assert notes.read["w_scale_inv"][-1][0] == -(-stop // 128) - start // 128
        assert torch.equal(CODEC.decode((codes, scales), rows=slice(start, stop)), whole[start:stop])


def test_a_shard_that_takes_its_own_corner_for_the_first_block_is_told_apart() -> None:
    """What goes wrong where blocks are counted from a shard's first row: half of 576 rows begin inside a block."""
    codes, scales = quantised(torch.randn(576, 128, generator=torch.Generator().manual_seed(1)))
    whole = dequantised(codes, scales, torch.float32)
    wrong = dequantised(codes[288:], scales[2:], torch.float32)
    assert not torch.equal(wrong, whole[288:])
    assert torch.equal(decoded(codes, scales)[0].cut("w", -2, 288, 576), whole[288:])


def test_rows_of_a_folder_are_read_from_the_file_alone(released: Path) -> None:
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    found = read(released)
    whole = dequantised(found[name], found[f"{name}_scale_inv"])
    with opened(released) as folder:
        source: Any = folder.source
        for ranks in (1, 2, 3, 4, 8):
            edges = [(576 * r // ranks, 576 * (r + 1) // ranks) for r in range(ranks)]
            assert torch.equal(torch.cat([source.cut(name, -2, *edge) for edge in edges]), whole)
        assert torch.equal(source.cut("lm_head.weight", -2, 5, 9), found["lm_head.weight"][5:9])


class Counting:
    """A source that notes the names it is asked for."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.asked: list[str] = []

    def names(self) -> Any:
        return self.source.names()

    def get(self, name: str) -> Tensor:
        self.asked.append(name)
        found: Tensor = self.source.get(name)
        return found


@pytest.mark.parametrize("weights", [None, "keep"])
def test_only_the_experts_asked_for_are_read(released: Path, weights: str | None) -> None:
    with opened(released, weights) as folder:
        source = Counting(folder.source)
        get = lookup(folder.spec, folder.dialect, source, released)
        source.asked.clear()
        for start, stop in ((0, 2), (3, 4), (6, 8)):
            for name in STACKS:
                part = get(name, groups=(start, stop))
                assert len(source.asked) == stop - start
                assert all(f".experts.{e}." in " ".join(source.asked) for e in range(start, stop))
                source.asked.clear()
                assert torch.equal(bits(part), bits(get(name)[start:stop]))
                source.asked.clear()


@pytest.fixture(scope="module")
def ours(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of ours: under a dialect's names and under our own, of codes and plain."""
    root = tmp_path_factory.mktemp("ours")
    for weights in ("keep", "bfloat16"):
        spec = cf.import_model(released, root / f"dialect-{weights}", weights=weights)
        model = cf.build(spec.with_({"norm.eps": 1e-5}), seed=0)
        assert cf.save(model, root / f"native-{weights}") == "native"
    return lambda name: root / name


@pytest.mark.parametrize("name", ["dialect-keep", "dialect-bfloat16", "native-keep", "native-bfloat16"])
@pytest.mark.parametrize("weights", [None, "bfloat16"])
def test_groups_are_slices_in_every_folder(ours: Callable[[str], Path], name: str, weights: str | None) -> None:
    with opened(ours(name), weights) as folder:
        get = lookup(folder.spec, folder.dialect, folder.source, ours(name))
        for stored, weight in folder.spec.formats.stored.items():
            if len(weight.shape) == 3:
                for start, stop in ((0, 8), (2, 4), (7, 8)):
                    assert torch.equal(bits(get(stored, groups=(start, stop))), bits(get(stored)[start:stop]))


def test_a_native_folder_reads_no_more_of_a_stack_than_its_groups(ours: Callable[[str], Path]) -> None:
    with WeightReader(ours("native-keep")) as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightReader, "get", lambda *_: pytest.fail("a whole tensor was read"))
        spec = cf.Spec.load(ours("native-keep") / "spec.toml")
        get = lookup(spec, "native", reader, ours("native-keep"))
        assert get("layers.1.ffn.up.weight", groups=(2, 3)).shape == (1, 130, 160)
