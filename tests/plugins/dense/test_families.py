"""Each family's dialect against transformers: logits, padding, greedy text, gradients, bytes there and back.

Tiny models with random weights, norms and biases too; positions go beyond the original length of every
extended rotary table.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from composeformer.assemble import fill, skeleton
from composeformer.decoder import Model
from composeformer.dialects import Dialect, find
from composeformer.folder import WeightReader, strict_json
from composeformer.spec import Spec

BOUND = 1e-5
VOCABULARY = 67
LENGTH = 48
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 2, "truncate": False}
SLIDING = {"use_sliding_window": True, "sliding_window": 7}

# Each row: the family, and what differs from SHARED.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped": ("Llama", {}),
    "llama-multi-head-tied": (
        "Llama",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 3e-5},
    ),
    "llama-multi-query-biased": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 12}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN | MSCALE, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "mistral-full-tied": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True, "head_dim": 12}),
    "mistral-multi-query-yarn": (
        "Mistral",
        {"num_key_value_heads": 1, "sliding_window": 64, "rope_parameters": YARN},
    ),
    "qwen2-full": ("Qwen2", {"rms_norm_eps": 7e-6}),
    "qwen2-later-layers-slide": ("Qwen2", SLIDING | {"max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen2-listed-layers-slide": (
        "Qwen2",
        SLIDING
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": YARN,
        },
    ),
    "qwen3-tied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True, "rms_norm_eps": 2e-5}),
    "qwen3-biased-multi-query": (
        "Qwen3",
        {"num_key_value_heads": 1, "attention_bias": True, "rope_parameters": LINEAR},
    ),
    "qwen3-sliding-llama3": (
        "Qwen3",
        SLIDING | {"max_window_layers": 2, "head_dim": 16, "rope_parameters": LLAMA3 | {"rope_theta": 5e4}},
    ),
}


@attrs.frozen(eq=False)
class Pair:
    """A model of transformers in `folder`, and ours with the same weights."""

    folder: Path
    theirs: Any
    ours: Model
    dialect: Dialect
    spec: Spec
    config: dict[str, Any]


def make(case: str, folder: Path) -> Pair:
    """A pair in fp32; every tensor is random, norms and biases too."""
    family, changes = CASES[case]
    stated = json.loads(json.dumps(SHARED | changes))
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**stated))
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(noise * 0.3 + (1.0 if "norm" in name else 0.0))
    theirs.save_pretrained(folder)
    theirs = load(folder)
    config = json.loads((folder / "config.json").read_text())
    dialect = find(config)
    spec = Spec.from_dict(dialect.to_spec(config))
    return Pair(folder, theirs, ours(dialect, spec, folder), dialect, spec, config)


def load(folder: Path, attention: str = "eager") -> Any:
    """The folder's model as transformers loads it, ready to be compared."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, local_files_only=True, trust_remote_code=False
    )
    return model.eval()


def ours(dialect: Dialect, spec: Spec, folder: Path, dtype: str = "float32") -> Model:
    model = skeleton(spec, dtype=dtype)
    with WeightReader(folder) as reader:
        fill(model, dialect.read(spec, reader), "cpu")
    return model


def tokens(rows: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def wide_norms(model: Any) -> Iterator[None]:
    """transformers' norms round to fp32 even in fp64; here they keep the input's dtype: exact gradients."""

    def forward(self: Any, x: Tensor) -> Tensor:
        scaled: Tensor = (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )
        return scaled

    classes = {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}
    before: list[tuple[Any, Callable[..., Tensor]]] = [(cls, cls.forward) for cls in classes]
    try:
        for cls in classes:
            cls.forward = forward
        yield
    finally:
        for cls, original in before:
            cls.forward = original


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(0)
    return make(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_agree_at_every_position(pair: Pair) -> None:
    ids = tokens(2)
    with torch.no_grad():
        found, wanted = pair.ours(ids).logits, pair.theirs(input_ids=ids).logits
    assert error(found, wanted) <= BOUND


def test_logits_agree_with_left_padding(pair: Pair) -> None:
    ids = tokens(3, seed=1)
    valid = torch.arange(ids.shape[1])[None] >= torch.tensor([0, 5, 31])[:, None]
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = pair.ours(ids.where(valid, torch.zeros_like(ids)), valid=valid).logits
        wanted = pair.theirs(input_ids=ids, attention_mask=valid.long(), position_ids=positions).logits
    assert error(found[valid], wanted[valid]) <= BOUND


def test_greedy_text_is_the_same(pair: Pair) -> None:
    prompt, new = tokens(2, 11, seed=2), 14
    valid = torch.arange(11)[None] >= torch.tensor([0, 4])[:, None]
    wanted = pair.theirs.generate(
        prompt,
        attention_mask=valid.long(),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=-1,
    )
    cache = pair.ours.new_cache(2, 11 + new)
    text, step = prompt, prompt
    with torch.no_grad():
        for index in range(new):
            output = pair.ours(step, cache=cache, valid=valid if index == 0 else None, last_only=True)
            step = output.logits.argmax(-1)
            text = torch.cat([text, step], 1)
    assert torch.equal(text, wanted)


def worst_gradient(pair: Pair, built: Model, theirs: Any, dtype: torch.dtype) -> float:
    """The largest error of any gradient of a random sum of logits; ours go through the dialect's lines."""
    ids = tokens(2, 24, seed=3)
    weights = torch.randn(2, 24, VOCABULARY, generator=torch.Generator().manual_seed(4)).to(dtype)
    for model in (built, theirs):
        model.zero_grad()
    (built(ids).logits * weights).sum().backward()
    (theirs(input_ids=ids).logits * weights).sum().backward()
    found: dict[str, Any] = {name: parameter.grad for name, parameter in built.named_parameters()}
    gradients = dict(pair.dialect.write(pair.spec, found.__getitem__))
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == wanted.keys()
    return max(error(gradients[name], wanted[name]) for name in wanted)


def test_every_gradient_agrees(pair: Pair) -> None:
    assert worst_gradient(pair, pair.ours, pair.theirs, torch.float32) <= BOUND


def test_every_gradient_agrees_beyond_rounding_in_float64(pair: Pair) -> None:
    built = ours(pair.dialect, pair.spec, pair.folder, "float64")
    theirs = load(pair.folder, "sdpa").double()
    with wide_norms(theirs):
        assert worst_gradient(pair, built, theirs, torch.float64) <= 1e-11


def test_weights_go_there_and_back_bit_by_bit(pair: Pair) -> None:
    state = pair.ours.state_dict()
    written = dict(pair.dialect.write(pair.spec, state.__getitem__))
    with WeightReader(pair.folder) as reader:
        assert written.keys() == reader.names().keys()
        for name, tensor in written.items():
            original = reader.get(name)
            assert tensor.dtype == original.dtype
            assert torch.equal(tensor.view(torch.int32), original.view(torch.int32)), name


def test_exported_folder_loads_in_transformers_to_equal_logits(pair: Pair, tmp_path: Path) -> None:
    config = pair.dialect.to_config(pair.spec)
    (tmp_path / "config.json").write_text(strict_json.dumps(config))
    save_file(
        dict(pair.dialect.write(pair.spec, pair.ours.state_dict().__getitem__)),
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    again, ids = load(tmp_path), tokens(2, seed=5)
    assert type(again) is type(pair.theirs)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, pair.theirs(input_ids=ids).logits)
