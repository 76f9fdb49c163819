"""A folder is the same whatever processes wrote it, and any number of them reads it."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import composeformer as cf
from composeformer.errors import ComposeError, FolderError, InputError
from composeformer.exchange import CommError
from composeformer.parallel import gathering
from composeformer.spec import Spec
from composeformer.testing.ranks import RanksFailed, on_ranks

from .conftest import Held, held, joined, raw, spec

# By the number of processes: how many share the experts, and whether the rest is sharded.
LAYOUTS = {2: ((2, False),), 4: ((1, True), (2, True), (4, True))}
FEWER = {2: ((2, False),), 4: ((4, True),)}
MAX_BYTES = 2**14
# What is written, by which layouts. Names and codes are the same whoever gathers them.
KINDS = (("native", LAYOUTS), ("dialect", FEWER), ("coded", FEWER))


def model_of(kind: str, experts: int, shard: bool = True) -> Spec:
    """A spec that no dialect expresses, tied and in float64; one that a dialect does, in bfloat16 with fp32 masters;
    the same stored as codes and scales.
    """
    if kind == "native":
        return spec(experts, shard, model__tie_embeddings=True, ffn__dense__activation="gelu")
    settings = (f"parallel.expert={experts}", f"parallel.shard={'true' if shard else 'false'}")
    found = Spec.load("tiny-deepseek-v3", settings).with_(comm={"kind": "collective"})
    found = found.with_({"layers": [{"mixer": "mla", "ffn": "dense"}, {"mixer": "mla", "ffn": "experts"}]})
    precision = {"kind": "bf16"} if kind == "dialect" else {"kind": "fp8-block", "weights": "float8_e4m3fn"}
    return found.with_(precision=precision)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("kind", "layouts_of"), KINDS)
def test_every_layout_writes_the_bytes_of_one_process_and_reads_them_all(
    kind: str, layouts_of: dict[int, Any], tmp_path: Path
) -> None:
    def write(rank: int, size: int) -> list[tuple[str, list[str]]]:
        told = []
        for experts, shard in layouts_of[size]:
            folder = tmp_path / f"{size}-{experts}-{shard}"
            made, seen = cf.build(model_of(kind, experts, shard), seed=1), [0]
            show = lambda done, total, to=seen: to.append(done)  # noqa: E731
            dialect = cf.save(made, folder, max_shard_bytes=MAX_BYTES, progress=show)
            assert (len(seen) > 1) == (rank == 0)
            # Who returns finds the folder there.
            told.append((dialect, sorted(path.name for path in folder.iterdir())))
        return told

    named = "native" if kind == "native" else "deepseek_v3"
    for size, layouts in layouts_of.items():
        told = on_ranks(size, write, size)
        assert told == [told[0]] * size
        for (experts, shard), (dialect, names) in zip(layouts, told[0], strict=True):
            one = tmp_path / f"one-{experts}-{shard}"
            assert (
                cf.save(
                    cf.build(model_of(kind, experts, shard), seed=1),
                    one,
                    max_shard_bytes=MAX_BYTES,
                    replace=True,
                )
                == dialect
                == named
            )
            wanted = files(one)
            assert files(tmp_path / f"{size}-{experts}-{shard}") == wanted
            assert names == sorted(wanted)
            assert sum(name.endswith(".safetensors") for name in wanted) > 1

    written = [(size, *layout) for size, layouts in layouts_of.items() for layout in layouts]
    folders = [tmp_path / f"{size}-{experts}-{shard}" for size, experts, shard in written]

    def read(rank: int, into: int) -> list[dict[str, Held]]:
        models = (cf.load(folder, overrides=[f"parallel.expert={into}"]) for folder in folders)
        return [held(model, model.state_dict()) for model in models]

    values = bits(
        {name: tensor.detach() for name, tensor in cf.load(tmp_path / "one-2-False").state_dict().items()}
    )
    for size, into in ((2, 2), (4, 1), (4, 4)) if layouts_of is LAYOUTS else ((2, 2), (4, 4)):
        for parts in zip(*on_ranks(size, read, into), strict=True):
            assert bits(joined(parts, into)) == values
            assert ("expert" in {each.how for each in parts[0].values()}) == (into > 1)
    assert [bits({name: each.value for name, each in one.items()}) for one in read(0, 1)] == [values] * len(folders)


def test_a_process_reads_no_expert_of_others(tmp_path: Path) -> None:
    found = spec(2, shard=False, ffn__dense__activation="gelu")
    cf.save(cf.build(found, seed=1), tmp_path / "folder")
    from composeformer.store import accounting

    def read(rank: int) -> dict[str, tuple[int, int] | None]:
        asked: dict[str, tuple[int, int] | None] = {}
        taken = accounting.taken

        def told(source: object, name: str, groups: tuple[int, int] | None = None) -> Tensor:
            asked[name] = groups
            return taken(source, name, groups)  # type: ignore[arg-type]

        accounting.taken = told
        cf.load(tmp_path / "folder")
        return asked

    for rank, asked in enumerate(on_ranks(2, read)):
        stacks = {name for name in asked if name.split(".")[-2] in ("gate", "up", "down") and "ffn" in name}
        stacks -= {name for name in stacks if "router" in name or name.startswith("layers.0")}
        assert len(stacks) == 6
        assert {name: groups for name, groups in asked.items() if groups is not None} == dict.fromkeys(
            stacks, (4 * rank, 4 * rank + 4)
        )


def test_where_the_first_process_can_not_write_all_end_with_its_line(tmp_path: Path) -> None:
    found = spec(2)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")

    def write(rank: int, target: str, limit: int | None) -> tuple[str, tuple[str, ...]]:
        model = cf.build(found)
        if limit is not None and rank == 0:
            # As a full disk does, this refuses what is over the limit.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(ComposeError) as caught:
            cf.save(model, tmp_path / target)
        return type(caught.value).__name__, caught.value.lines

    for target, limit, said in (("taken", None, "not empty"), ("full", 4096, "File too large")):
        (kind, lines), other = on_ranks(2, lambda rank, t=target, n=limit: write(rank, t, n), timeout=30)
        assert (kind, lines) == other
        assert kind == FolderError.__name__
        assert len(lines) == 1
        assert said in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_is_killed_while_a_folder_is_replaced_leaves_the_old_one(
    dies: int, tmp_path: Path
) -> None:
    target, found = tmp_path / "folder", spec(2)
    cf.save(cf.build(found, seed=1), target)
    before = files(target)

    def write(rank: int) -> None:
        model = cf.build(found, seed=2)
        collected, number = gathering._collected, [0]

        def counted(*args: Any) -> Any:
            number[0] += 1
            if number[0] == 7 and rank == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return collected(*args)

        gathering._collected = counted
        with pytest.raises(CommError) as caught:
            cf.save(model, target, replace=True)
        (tmp_path / "told").write_text("|".join(caught.value.lines))

    with pytest.raises(RanksFailed, match=rf"^rank {dies} died with exit code -9$"):
        on_ranks(2, write, timeout=30)
    assert files(target) == before
    assert (tmp_path / "told").read_text().startswith(f"process {1 - dies} of 2: ")
    if dies:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "told"]


def test_an_error_of_another_sort_names_itself_in_the_others(tmp_path: Path) -> None:
    def write(rank: int) -> str:
        def tokenizer(folder: Path) -> None:
            raise KeyError("no words")

        model = cf.build(spec(2))
        with pytest.raises(KeyError if rank == 0 else ComposeError) as caught:
            cf.save(model, tmp_path / "folder", tokenizer=tokenizer)
        return str(caught.value)

    assert on_ranks(2, write)[1] == "process 0 failed: KeyError: 'no words'"


def test_overrides_of_a_folder_change_how_it_runs_and_nothing_else(tmp_path: Path) -> None:
    cf.save(cf.build(spec()), tmp_path / "folder")
    with pytest.raises(InputError, match=r"overrides = norm.eps=0.5: these change the model"):
        cf.load(tmp_path / "folder", overrides=["norm.eps=0.5"])
    assert cf.load(tmp_path / "folder", overrides=["parallel.shard=false"]).spec.parallel.shard is False
