"""A tiny model in float64 whose layers see all and a window, and a tokenizer of letters."""

import pytest

from composeformer.assemble import build
from composeformer.decoder import Model
from composeformer.spec import Spec

SPEC = {
    "model": {"vocab_size": 31, "hidden_size": 16, "max_position_embeddings": 40, "init_std": 0.4},
    "norm": {"kind": "rmsnorm"},
    "position": {"kind": "rope"},
    "mixer": {
        "all": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2},
        "near": {"kind": "gqa", "num_heads": 2, "window": 4},
    },
    "ffn": {"kind": "swiglu", "intermediate_size": 24},
    "layers": [{"mixer": "all"}, {"mixer": "near"}],
}


class Letters:
    """Each id is one or two letters; id 0 ends a text, and 30 is half of a letter that needs the next id."""

    eos_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) - ord("a") for letter in text]

    def stream(self, skip_special: bool = False) -> "LetterStream":
        return LetterStream()


class LetterStream:
    def __init__(self) -> None:
        self.half = ""

    def push(self, index: int) -> str:
        if index == 30:
            self.half += "<"
            return ""
        text = self.half + ("." if index == 0 else chr(ord("a") + (index - 1) % 26) * (1 + (index > 26)))
        self.half = ""
        return text

    def finish(self) -> str:
        half, self.half = self.half, ""
        return half


@pytest.fixture(scope="session")
def model() -> Model:
    return build(Spec.from_dict(SPEC), dtype="float64", seed=3)


@pytest.fixture
def letters() -> Letters:
    return Letters()
