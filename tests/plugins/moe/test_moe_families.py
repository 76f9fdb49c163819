"""DeepSeek-V2 and V3, Qwen3-MoE and Mixtral against transformers: logits, padding, greedy text, gradients, bytes.

Tiny models in fp32 with every tensor random, norms and the routers' biases too; positions go beyond the original
length of every extended rotary table. transformers computes eagerly: its loop over experts is the judge.
"""

import json
import re
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
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "moe_intermediate_size": 12,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
V3 = DEEPSEEK | {"num_nextn_predict_layers": 0}
GREEDY = {"topk_method": "greedy", "n_group": None, "topk_group": None}
LIMITED = {"topk_method": "group_limited_greedy"}
QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
V3_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
ODD_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 1.2, "beta_fast": 8}

# Each row: the family, what differs, and the mean of the routers' biases.
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "v3": ("DeepseekV3", V3 | {"rope_parameters": V3_YARN}, 0.0),
    "v3-unnormalised": ("DeepseekV3", V3 | {"norm_topk_prob": False, "rms_norm_eps": 1e-4}, 0.0),
    "v3-biases-all-negative": ("DeepseekV3", V3 | {"routed_scaling_factor": 1.5}, -30.0),
    "v3-biases-all-positive": ("DeepseekV3", V3 | {"n_group": 6, "topk_group": 3}, 30.0),
    "v3-no-groups-no-compression-biased-half-split-tied": (
        "DeepseekV3",
        V3
        | {
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            "tie_word_embeddings": True,
            "first_k_dense_replace": 0,
            "rope_parameters": ODD_YARN,
        },
        0.0,
    ),
    "v2-greedy": ("DeepseekV2", DEEPSEEK | GREEDY | {"q_lora_rank": None, "rms_norm_eps": 1e-4}, 0.0),
    "v2-greedy-in-spite-of-groups": ("DeepseekV2", DEEPSEEK | {"topk_method": "greedy"}, 0.0),
    "v2-limited-scaled-yarn": (
        "DeepseekV2",
        DEEPSEEK | LIMITED | {"routed_scaling_factor": 16.0, "rope_parameters": ODD_YARN},
        0.0,
    ),
    "qwen3-normalised": ("Qwen3Moe", QWEN | {"norm_topk_prob": True, "head_dim": 12}, 0.0),
    "qwen3-unnormalised-some-dense": (
        "Qwen3Moe",
        QWEN | {"norm_topk_prob": False, "mlp_only_layers": [1], "rope_parameters": YARN},
        0.0,
    ),
    "qwen3-every-second-sliding-biased-tied": (
        "Qwen3Moe",
        QWEN
        | {
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        0.0,
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 0.0),
    "mixtral-window": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9, "head_dim": 12},
        0.0,
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


def randomise(model: Any, seed: int, bias: float) -> None:
    """Random values for every tensor. Maps shrink their input a little, lest rounding grow from layer to layer;
    routers do not, so that no expert is certain and a bias of a few tenths changes the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                gain = 1.0 if "gate.weight" in name else 0.7
                tensor.copy_(noise * gain * tensor.shape[-1] ** -0.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(noise * 0.3 + bias)
            elif "inv_freq" not in name:
                tensor.copy_(noise * 0.3 + (1.0 if "norm" in name else 0.0))


def make(case: str, folder: Path) -> Pair:
    family, changes, bias = CASES[case]
    stated = json.loads(json.dumps(SHARED | changes))
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**stated))
    randomise(theirs, len(case), bias)
    theirs.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    dialect = find(config)
    spec = Spec.from_dict(dialect.to_spec(config))
    model = skeleton(spec, dtype="float32")
    with WeightReader(folder) as reader:
        fill(model, dialect.read(spec, reader), "cpu")
    return Pair(folder, load(folder), model, dialect, spec)


def load(folder: Path) -> Any:
    """The folder's model as transformers loads it, ready to be compared."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    )
    return model.eval()


def tokens(rows: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max())


def padded(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which of them are real, and positions that count the real ones."""
    ids = tokens(rows, seed=seed)
    valid = torch.arange(LENGTH)[None] >= torch.tensor([0, 5, 31])[:rows, None]
    return ids.where(valid, torch.zeros_like(ids)), valid, (valid.cumsum(1) - 1).clamp(min=0)


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make(request.param, tmp_path_factory.mktemp("family"))


def test_logits_agree_at_every_position(pair: Pair) -> None:
    ids = tokens(2)
    with torch.no_grad():
        found, wanted = pair.ours(ids).logits, pair.theirs(input_ids=ids).logits
    assert error(found, wanted) <= BOUND


def test_logits_agree_with_left_padding(pair: Pair) -> None:
    ids, valid, positions = padded(3, 1)
    with torch.no_grad():
        found = pair.ours(ids, valid=valid).logits
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


def released(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of transformers' modules as files have it: experts apart, gate and up apart, Mixtral's old names."""
    stem, _, leaf = name.rpartition(".experts.")
    if not stem:
        return {name: tensor}
    parts = (
        dict(zip(("gate", "up"), tensor.chunk(2, 1), strict=True))
        if leaf == "gate_up_proj"
        else {"down": tensor}
    )
    return {
        f"{stem}.experts.{e}.{part}_proj.weight": stack[e]
        for part, stack in parts.items()
        for e in range(len(stack))
    }


def mixtral(name: str) -> str:
    """Mixtral's names in files, for those of its modules."""
    name = name.replace(".mlp.", ".block_sparse_moe.")
    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        name = re.sub(rf"(experts\.\d+)\.{ours}\.", rf"\1.{theirs}.", name)
    return name


@pytest.mark.parametrize("left_padded", [False, True])
def test_every_gradient_agrees(pair: Pair, left_padded: bool) -> None:
    """Of a random sum of the real tokens' logits, the label of a row's first one left out."""
    ids, valid, positions = padded(2, 3)
    if not left_padded:
        valid, positions = torch.ones_like(valid), torch.arange(LENGTH).expand(2, -1)
    weights = (
        torch.randn(2, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(4)) * valid[..., None]
    )
    for model in (pair.ours, pair.theirs):
        model.zero_grad()
    (pair.ours(ids, valid=valid if left_padded else None).logits * weights).sum().backward()
    mask = {"attention_mask": valid.long()} if left_padded else {}
    (pair.theirs(input_ids=ids, position_ids=positions, **mask).logits * weights).sum().backward()
    ours: dict[str, Any] = {name: each.grad for name, each in pair.ours.named_parameters()}
    ours |= {name: torch.zeros_like(each) for name, each in pair.ours.named_buffers()}
    found = dict(pair.dialect.write(pair.spec, ours.__getitem__))
    compared = set()
    for name, parameter in pair.theirs.named_parameters():
        # An expert may have no tokens: its scale is that of all.
        scale = parameter.grad.abs().max()
        for file_name, wanted in released(name, parameter.grad).items():
            file_name = mixtral(file_name) if pair.dialect.name == "mixtral" else file_name
            assert float((found[file_name] - wanted).abs().max() / scale) <= BOUND, file_name
            compared.add(file_name)
    assert compared == {name for name in found if not name.endswith("e_score_correction_bias")}


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
    (tmp_path / "config.json").write_text(strict_json.dumps(pair.dialect.to_config(pair.spec)))
    save_file(
        dict(pair.dialect.write(pair.spec, pair.ours.state_dict().__getitem__)),
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    again, ids = load(tmp_path), tokens(2, seed=5)
    assert type(again) is type(pair.theirs)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, pair.theirs(input_ids=ids).logits)


def test_a_bias_decides_where_it_is_strong(pair: Pair) -> None:
    """These cases would show a router that ignores its bias: without it logits differ."""
    biases = {n: b for n, b in pair.ours.named_buffers() if n.endswith("router.bias")}
    if not biases:
        assert pair.dialect.name != "deepseek_v3"
        return
    ids = tokens(1, seed=6)
    with torch.no_grad():
        before = pair.ours(ids).logits
        kept = {name: bias.clone() for name, bias in biases.items()}
        for bias in biases.values():
            bias.zero_()
        without = pair.ours(ids).logits
        for name, bias in biases.items():
            bias.copy_(kept[name])
    assert error(before, without) > 100 * BOUND
