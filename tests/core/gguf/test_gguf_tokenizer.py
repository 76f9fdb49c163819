"""The tokenizer in a GGUF file becomes Hugging Face files that say the same, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from composeformer.errors import DialectError
from composeformer.gguf import write_tokenizer
from composeformer.gguf.pre import PRE
from composeformer.text import Tokenizer
from composeformer.text.stream import byte_alphabet

# every byte, a few merges, then tokens that text names whole
BYTES = list(byte_alphabet())
MERGED = ["Ġa", "bc", "Ġabc"]
NAMED = ["<s>", "</s>", "<|eot_id|>", "  two spaces", "<unk>"]
TOKENS = [*BYTES, *MERGED, *NAMED]
IDS = {text: index for index, text in enumerate(TOKENS)}


def metadata(**changes: Any) -> dict[str, object]:
    given: dict[str, object] = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * (len(BYTES) + len(MERGED)) + [3, 3, 3, 4, 2],
        "tokenizer.ggml.merges": ["Ġ a", "b c", "Ġa bc"],
        "tokenizer.ggml.bos_token_id": IDS["<s>"],
        "tokenizer.ggml.eos_token_id": IDS["</s>"],
        "tokenizer.chat_template": "{{ messages }}",
    }
    given |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in given.items() if value is not None}


def load(folder: Path, **changes: Any) -> Tokenizer:
    write_tokenizer(metadata(**changes), folder)
    return Tokenizer(folder)


def test_the_files_are_named_and_plain_json(tmp_path: Path) -> None:
    names = write_tokenizer(metadata(), tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert isinstance(json.loads((tmp_path / name).read_text("utf-8")), dict)


def test_ids_keep_their_places_and_merges_apply(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.encode(" abc a") == [IDS["Ġabc"], IDS["Ġa"]]
    assert tokenizer.decode(tokenizer.encode("ünï\n")) == "ünï\n"


@pytest.mark.parametrize(
    ("pre", "add_bos", "add_eos", "expected"),
    [
        ("gpt-2", None, None, ["b"]),
        ("gpt-2", True, False, ["<s>", "b"]),
        ("gpt-2", False, True, ["b", "</s>"]),
        ("gpt-2", True, True, ["<s>", "b", "</s>"]),
        ("llama-bpe", None, None, ["<s>", "b"]),
        ("llama-bpe", False, None, ["b"]),
    ],
)
def test_flags_decide_what_surrounds_a_text(
    pre: str, add_bos: bool | None, add_eos: bool | None, expected: list[str], tmp_path: Path
) -> None:
    tokenizer = load(tmp_path, pre=pre, add_bos_token=add_bos, add_eos_token=add_eos)
    assert tokenizer.encode("b") == [IDS[text] for text in expected]
    assert tokenizer.encode("b", add_special=False) == [IDS["b"]]


def test_token_types_decide_what_text_can_name(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    text = "b<s>  two spaces<unk>"
    assert tokenizer.encode(text) == [IDS["b"], IDS["<s>"], IDS["  two spaces"], IDS["<unk>"]]
    # as plain characters only the user-defined token is still itself
    plain = tokenizer.encode(text, parse_special=False)
    assert IDS["  two spaces"] in plain
    assert not {IDS["<s>"], IDS["<unk>"]} & set(plain)
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == "b  two spaces"


def test_a_turn_ends_at_every_token_that_ends_one(tmp_path: Path) -> None:
    assert load(tmp_path).eos_ids == (IDS["</s>"], IDS["<|eot_id|>"])
    assert load(tmp_path, eom_token_id=IDS["b"]).eos_ids == (IDS["</s>"], IDS["b"], IDS["<|eot_id|>"])
    normal = [1] * len(TOKENS)
    assert load(tmp_path, token_type=normal).eos_ids == (IDS["</s>"],)


def test_special_ids_and_the_template_survive(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, padding_token_id=IDS["<unk>"])
    assert (tokenizer.bos_id, tokenizer.pad_id) == (IDS["<s>"], IDS["<unk>"])
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.chat_template == "{{ messages }}"
    assert load(tmp_path, bos_token_id=None, eos_token_id=None, token_type=None).bos_id is None


def test_an_empty_token_and_a_repeated_merge_are_as_in_llama_cpp(tmp_path: Path) -> None:
    tokens = [*TOKENS, ""]
    tokenizer = load(tmp_path, tokens=tokens, token_type=None, merges=["Ġ a", "b c", "Ġa bc", "Ġ a"])
    assert tokenizer.vocab_size == len(tokens)
    assert tokenizer.encode(" abc") == [IDS["Ġabc"]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "llama"}, 'tokenizer.ggml.model = "llama": allowed are gpt2'),
        ({"model": None}, "tokenizer.ggml.model: missing"),
        ({"pre": "smolm"}, 'tokenizer.ggml.pre = "smolm": allowed are default, gpt-2'),
        ({"pre": "smolm"}, "did you mean 'smollm'"),
        ({"pre": 3}, "tokenizer.ggml.pre: found int, must be str"),
        ({"tokens": None}, "tokenizer.ggml.tokens: missing"),
        ({"tokens": [1, 2]}, "must be a list of strings"),
        ({"tokens": [*TOKENS, "bc"]}, '"bc" is there twice'),
        ({"token_type": [1]}, "as long as tokenizer.ggml.tokens"),
        ({"merges": None}, "tokenizer.ggml.merges: missing"),
        ({"merges": ["Ġa"]}, '"Ġa" does not join two tokens'),
        ({"merges": ["Ġ b"]}, '"Ġ b" does not join two tokens'),
        ({"bos_token_id": len(TOKENS)}, "must be below the number of tokens"),
        ({"bos_token_id": "1"}, "found str, must be int"),
        ({"bos_token_id": None, "add_bos_token": True}, "bos_token_id: missing"),
        ({"add_bos_token": 1}, "found int, must be bool"),
    ],
)
def test_what_can_not_be_said_is_refused_by_name(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(DialectError) as caught:
        write_tokenizer(metadata(**changes), tmp_path)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pre", PRE)
def test_every_known_cutting_loses_nothing(pre: str, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, pre=pre)
    text = "I'M 12345 années;\r\n\r\n\t  x  2 … 日本 ½'s!!  "
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def test_transformers_reads_the_folder_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ours = load(tmp_path, pre="llama-bpe", padding_token_id=IDS["</s>"])
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "x  2 a abc <s>12"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text, add_special=False)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.bos_id,
        IDS["</s>"],
        ours.pad_id,
    )
    assert theirs.chat_template == ours.chat_template
    generation = transformers.GenerationConfig.from_pretrained(str(tmp_path))
    assert generation.eos_token_id == list(ours.eos_ids)
