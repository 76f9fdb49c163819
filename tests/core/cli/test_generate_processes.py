"""`compose generate` under a launcher of processes: the first makes and prints what one process would."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

# What ranks import is imported before they are forked.
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
from tokenizers import decoders, models, pre_tokenizers
from torch import distributed as dist

import composeformer as cf
import composeformer.parallel.sharding
import composeformer.text
from composeformer.cli import main
from composeformer.parallel import stop
from composeformer.testing.ranks import on_ranks

Ended = tuple[int, str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("spread") / "m"
    cf.save(cf.build("tiny-deepseek-v3", dtype="float64", seed=0), path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def compose(words: tuple[object, ...], given: bytes = b"", out: Callable[[], Any] = io.StringIO) -> Ended:
    """The exit status, standard output and standard error of one command in this process."""
    before = sys.argv, sys.stdin, sys.stdout, sys.stderr
    written, told = out(), io.StringIO()
    sys.argv = ["compose", *map(str, words)]
    sys.stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
    sys.stdout, sys.stderr = written, told
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0), written.getvalue(), told.getvalue()
    finally:
        sys.argv, sys.stdin, sys.stdout, sys.stderr = before
    raise AssertionError("a command ends by leaving")


def spread(words: tuple[object, ...], given: bytes = b"", out: Callable[[], Any] = io.StringIO) -> list[Ended]:
    """The same in each of two processes that share the experts; the first alone has what is `given`."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = (*words, "--set", "parallel.expert=2", "--set", 'comm.kind="collective"')

    def run(rank: int) -> Ended:
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        try:
            return compose(words, b"" if rank else given, out)
        finally:
            stop()

    return on_ranks(2, run, gloo=False)


@pytest.mark.parametrize(
    "more",
    [
        ("--prompt", "to be"),
        ("--prompt", "-", "--speculate"),
        ("--prompt", "to be", "--prompt", "or not", "--json", "--temperature", "1", "--speculate"),
    ],
    ids=" ".join,
)
def test_the_first_process_prints_what_one_would(folder: Path, more: tuple[str, ...]) -> None:
    words = ("generate", folder, "--max-new-tokens", 6, *more)
    alone = compose(words, b"from the pipe")
    first, other = spread(words, b"from the pipe")
    assert first == alone
    assert other == (0, "", "")
    if "--json" in more:
        assert [len(row["ids"]) for row in json.loads(first[1])["generations"]] == [6, 6]


@pytest.mark.parametrize(
    ("prompt", "given", "line"),
    [
        ("-", b"\xff", "--prompt -: standard input is not utf-8 text"),
        ("-", b"", "process 0: prompt: is empty: it has no tokens"),
    ],
)
def test_what_the_first_can_not_read_or_serve_ends_all_in_one_line(
    folder: Path, prompt: str, given: bytes, line: str
) -> None:
    assert spread(("generate", folder, "--prompt", prompt), given) == [(2, "", f"compose: {line}\n")] * 2


class Gone(io.StringIO):
    """Standard output that nobody reads after its first piece."""

    def write(self, text: str) -> int:
        if self.getvalue():
            raise BrokenPipeError
        return super().write(text)


def test_a_reader_that_has_enough_ends_all(folder: Path) -> None:
    words = ("generate", folder, "--prompt", "to be", "--max-new-tokens", 200)
    first, other = spread(words, out=Gone)
    assert first[0] == other[0] == 0
    assert len(first[1]) <= 2
    assert (first[2], other[2]) == ("", "")


torch.set_num_threads(1)
