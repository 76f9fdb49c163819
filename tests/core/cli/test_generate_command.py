"""`compose generate` with drafts: the same text, what they gave on standard error, counts in the document."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import composeformer as cf
from composeformer.cli import main


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compose", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def folder(path: Path, spec: str) -> Path:
    """A model of bytes with a tokenizer of bytes."""
    cf.save(cf.build(spec, seed=0), path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_drafts_change_no_text_and_are_reported(compose: Any, tmp_path: Path) -> None:
    model = folder(tmp_path / "m", "tiny-deepseek-v3")
    words = ("generate", model, "--prompt", "to be", "--max-new-tokens", 24)
    code, plain, told = compose(*words)
    assert (code, told) == (0, "")
    code, drafted, told = compose(*words, "--speculate")
    assert (code, drafted) == (0, plain)
    assert "drafts accepted" in told
    assert "tokens a step" in told
    code, _, told = compose(*words, "--prompt", "or not", "--speculate")
    assert code == 0
    assert "drafts accepted" in told
    (row,) = json.loads(compose(*words, "--speculate", "--json")[1])["generations"]
    assert 0 <= row["accepted"] <= row["drafted"]
    assert len(row["ids"]) == 24 == row["steps"] + row["accepted"]


def test_a_model_without_a_predictor_can_not_speculate(compose: Any, tmp_path: Path) -> None:
    model = folder(tmp_path / "m", "tiny-llama")
    code, out, err = compose("generate", model, "--prompt", "x", "--speculate")
    assert (code, out) == (2, "")
    assert "speculate: needs a model with a predictor, and tiny-llama has none" in err
    assert len(err.strip().splitlines()) == 1
