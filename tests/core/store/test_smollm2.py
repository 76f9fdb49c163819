"""The real model: imported from its GGUF file, it says what transformers says of the same file."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import composeformer as cf
from composeformer.generation import stream
from composeformer.store import tokenizer_of
from composeformer.text import render_chat

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "smollm2_parity.py"


@pytest.fixture(scope="module")
def parity() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def model(parity: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    cf.import_model(parity["model_file"](), folder)
    return cf.load(folder)


def test_imported_model_is_the_shipped_spec(model: Any) -> None:
    assert model.spec.fingerprint == cf.Spec.load("smollm2-135m").fingerprint
    assert cf.cost(model.spec).total == 134_515_008


def test_real_model_agrees_with_transformers_at_every_position(parity: dict[str, Any], model: Any) -> None:
    figures = parity["compare"](model, parity["reference"](parity["model_file"]()), parity["PROMPTS"], 64)
    assert figures["logits_max_relative"] <= 1e-5
    assert all(difference["admitted"] for difference in figures["first_differences"]), figures[
        "first_differences"
    ]
    assert figures["tokens_compared"] == 20 * 64


def test_real_model_answers_paris_streamed(model: Any) -> None:
    tokenizer = tokenizer_of(model)
    assert tokenizer is not None
    assert tokenizer.chat_template is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = render_chat(
        question, tokenizer.chat_template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or ""
    )
    pieces = list(
        stream(model, [tokenizer.encode(text, add_special=False)], tokenizer=tokenizer, max_new_tokens=32)
    )
    assert len(pieces) > 3
    assert "Paris" in "".join(piece.text for piece in pieces)
    assert pieces[-1].finish_reason == "stop"


def test_verify_finds_the_folder_and_the_file_equal(parity: dict[str, Any], model: Any) -> None:
    from composeformer.store.loading import open_any

    verdict = cf.verify(model, open_any(parity["model_file"]()), tokens=16)
    assert verdict.equal
    assert verdict.logits == 0.0
