"""Hugging Face tokenizer files from the tokenizer inside a GGUF file.

The file holds a byte-level BPE vocabulary and its merges as lists, the roles of some ids, a type for every
token, and the name of a way to cut text (see `pre`). Hugging Face says the same in `tokenizer.json`, so this
is a change of spelling, with one judge: the ids that llama.cpp gives.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import attrs

from composeformer.errors import DialectError, show
from composeformer.gguf.pre import Pre, find_pre

# The specification's token types that text can name; others are reached by merging only.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
# Control tokens that end a turn by name, for files that give only the end of text (llama.cpp does the same).
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def write_tokenizer(metadata: Mapping[str, object], folder: Path) -> list[str]:
    """Write the tokenizer of GGUF `metadata` into the existing `folder`; returns the names of the files.

    `tokenizer.json`, `tokenizer_config.json` (with the chat template), `special_tokens_map.json` and
    `generation_config.json`, as transformers and `composeformer.text` read them. Raises DialectError for a
    tokenizer that is missing, damaged, or of a kind that is not known to give llama.cpp's ids.
    """
    vocabulary = _Vocabulary.read(metadata)
    files = {
        "tokenizer.json": vocabulary.tokenizer(),
        "tokenizer_config.json": vocabulary.config(),
        "special_tokens_map.json": vocabulary.names(),
        "generation_config.json": vocabulary.generation(),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return list(files)


@attrs.frozen
class _Vocabulary:
    """What the metadata says, checked: every id is a token, every merge joins two tokens into a third."""

    tokens: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[int, dict[str, Any]]
    roles: dict[str, int]
    ends: list[int]
    pre: Pre
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    max_length: int | None

    @classmethod
    def read(cls, metadata: Mapping[str, object]) -> "_Vocabulary":
        model = _get(metadata, "tokenizer.ggml.model", str)
        if model != "gpt2":
            raise DialectError(f"tokenizer.ggml.model = {show(model)}: allowed are gpt2 (byte-level BPE)")
        pre = find_pre(_get(metadata, "tokenizer.ggml.pre", str, "default"))
        texts = _strings(metadata, "tokenizer.ggml.tokens")
        # an empty token takes no part in anything; llama.cpp gives it the same name
        texts = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
        tokens = {text: index for index, text in enumerate(texts)}
        if len(tokens) != len(texts):
            twice = next(text for index, text in enumerate(texts) if tokens[text] != index)
            raise DialectError(f"tokenizer.ggml.tokens: {show(twice)} is there twice")
        roles = {
            role: index
            for key, role in ROLES.items()
            if (index := _token_id(metadata, f"tokenizer.ggml.{key}_token_id", len(texts))) is not None
        }
        added = _added(metadata, texts)
        ends = [roles["eos"]] if "eos" in roles else []
        for key in ("eot", "eom"):
            index = _token_id(metadata, f"tokenizer.ggml.{key}_token_id", len(texts))
            ends += [] if index is None else [index]
        ends += [tokens[text] for text in END_OF_TURN if added.get(tokens.get(text, -1), {}).get("special")]
        add_bos = _get(metadata, "tokenizer.ggml.add_bos_token", bool, pre.add_bos)
        add_eos = _get(metadata, "tokenizer.ggml.add_eos_token", bool, False)
        for flag, role in ((add_bos, "bos"), (add_eos, "eos")):
            if flag and role not in roles:
                raise DialectError(f"tokenizer.ggml.{role}_token_id: missing, and add_{role}_token is true")
        architecture = _get(metadata, "general.architecture", str, "")
        return cls(
            tokens=tokens,
            merges=_merges(_strings(metadata, "tokenizer.ggml.merges"), tokens),
            added=added,
            roles=roles,
            ends=list(dict.fromkeys(ends)),
            pre=pre,
            add_bos=add_bos,
            add_eos=add_eos,
            chat_template=_get(metadata, "tokenizer.chat_template", str, None),
            max_length=_get(metadata, f"{architecture}.context_length", int, None),
        )

    def text(self, index: int) -> str:
        # dicts keep order, and ids are 0, 1, 2, ...: no second list is needed for four look-ups
        return next(text for text, other in self.tokens.items() if other == index)

    def names(self) -> dict[str, str]:
        return {f"{role}_token": self.text(index) for role, index in self.roles.items()}

    def tokenizer(self) -> dict[str, Any]:
        splits = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.pre.patterns
        ]
        bytes_only = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": index, **token} for index, token in sorted(self.added.items())],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytes_only]},
            "post_processor": self.template(),
            "decoder": bytes_only,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self.pre.whole_words,
                "vocab": self.tokens,
                "merges": self.merges,
            },
        }

    def template(self) -> dict[str, Any] | None:
        """The beginning- and end-of-text tokens around a text, or nothing."""
        begin = [self.roles["bos"]] if self.add_bos else []
        end = [self.roles["eos"]] if self.add_eos else []
        if not begin and not end:
            return None

        def around(sequence: str, kind: int) -> list[dict[str, Any]]:
            ids = [{"SpecialToken": {"id": self.text(index), "type_id": kind}} for index in begin]
            tail = [{"SpecialToken": {"id": self.text(index), "type_id": kind}} for index in end]
            return [*ids, {"Sequence": {"id": sequence, "type_id": kind}}, *tail]

        used = {self.text(index): index for index in begin + end}
        return {
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": around("A", 0) + around("B", 1),
            "special_tokens": {
                text: {"id": text, "ids": [index], "tokens": [text]} for text, index in used.items()
            },
        }

    def config(self) -> dict[str, Any]:
        special = [token["content"] for _, token in sorted(self.added.items()) if token["special"]]
        config: dict[str, Any] = {
            # The class that takes tokenizer.json as it stands; others rebuild the cutting from the family.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {str(index): token for index, token in sorted(self.added.items())},
            "additional_special_tokens": [text for text in special if text not in self.names().values()],
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **self.names(),
        }
        if self.max_length is not None:
            config["model_max_length"] = self.max_length
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config

    def generation(self) -> dict[str, Any]:
        ids: dict[str, Any] = {
            f"{role}_token_id": self.roles[role] for role in ("bos", "pad") if role in self.roles
        }
        if self.ends:
            ids["eos_token_id"] = self.ends[0] if len(self.ends) == 1 else self.ends
        return ids


def _get(metadata: Mapping[str, object], key: str, kind: type, *default: Any) -> Any:
    """The value of `key`, of exactly this type; the default where the file does not have the key."""
    value = metadata.get(key)
    if value is None and default:
        return default[0]
    if type(value) is not kind:
        found = "missing" if value is None else f"found {type(value).__name__}"
        raise DialectError(f"{key}: {found}, must be {kind.__name__}")
    return value


def _all_strings(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _strings(metadata: Mapping[str, object], key: str) -> list[str]:
    value = metadata.get(key)
    if not _all_strings(value):
        raise DialectError(
            f"{key}: {'missing' if value is None else 'found something else'}, must be a list of strings"
        )
    return value


def _token_id(metadata: Mapping[str, object], key: str, num_tokens: int) -> int | None:
    index: int | None = _get(metadata, key, int, None)
    if index is not None and not 0 <= index < num_tokens:
        raise DialectError(f"{key} = {index}: must be below the number of tokens ({num_tokens})")
    return index


def _merges(lines: list[str], tokens: dict[str, int]) -> list[tuple[str, str]]:
    pairs: dict[tuple[str, str], None] = {}  # the first of two equal merges counts, as in llama.cpp
    for line in lines:
        # the first character is part of the left token even when it is a space
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or left not in tokens or right not in tokens or left + right not in tokens:
            raise DialectError(f"tokenizer.ggml.merges: {show(line)} does not join two tokens into a third")
        pairs[left, right] = None
    return list(pairs)


def _added(metadata: Mapping[str, object], texts: list[str]) -> dict[int, dict[str, Any]]:
    """The tokens that text names whole, as Hugging Face describes them, by id."""
    key = "tokenizer.ggml.token_type"
    types = metadata.get(key, [])
    if not isinstance(types, list) or len(types) not in (0, len(texts)):
        raise DialectError(f"{key}: must be a list as long as tokenizer.ggml.tokens ({len(texts)})")
    return {
        index: {
            "content": texts[index],
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": kind != USER_DEFINED,
        }
        for index, kind in enumerate(types)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
