"""Configs of families with experts: released ones are the shipped specs, and each key says what it says there."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.dialects import expressing, find
from composeformer.errors import DialectError, SpecError
from composeformer.spec import Spec
from composeformer.spec.fingerprint import meaning

# As released.
RELEASED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "released_moe_configs.json").read_text()
)
FAMILIES = ("deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe")


def yarn(mscale: float) -> dict[str, Any]:
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


def spec_of(config: dict[str, Any]) -> Spec:
    return Spec.from_dict(find(config).to_spec(config))


def of(family: str, **changes: Any) -> dict[str, Any]:
    """The last released config of a family, in miniature."""
    config: dict[str, Any] = next(c for c in reversed(list(RELEASED.values())) if c["model_type"] == family)
    return config | {"num_hidden_layers": 4} | changes


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_the_shipped_spec(name: str) -> None:
    spec = Spec.load(name)
    assert spec_of(RELEASED[name]).fingerprint == spec.fingerprint
    assert expressing(spec)[0].model_type == RELEASED[name]["model_type"]


@pytest.mark.parametrize("name", RELEASED)
def test_a_written_config_says_all_that_the_released_one_says_of_the_model(name: str) -> None:
    written = find(RELEASED[name]).to_config(spec_of(RELEASED[name]))
    # Ids, dtypes and codes are carried beside; a width that no layer has, and windows that none has, are not said.
    unsaid = {
        "ep_size",
        "pretraining_tp",
        "seq_aux",
        "use_cache",
        "max_window_layers",
        "output_router_logits",
    }
    unsaid |= {
        "bos_token_id",
        "eos_token_id",
        "torch_dtype",
        "transformers_version",
        "auto_map",
        "rope_scaling",
        "quantization_config",
    }
    unsaid |= {"router_aux_loss_coef", "intermediate_size" if "qwen" in name else "use_cache"}
    unsaid |= {"sliding_window"} | ({"n_group", "topk_group"} if "lite" in name else set())
    unsaid |= {"aux_loss_alpha"} if name == "deepseek-v3" else set()
    assert {
        key: value for key, value in RELEASED[name].items() if key not in unsaid and written.get(key) != value
    } == {}
    stated = RELEASED[name].get("rope_scaling")
    if stated is not None:
        assert written["rope_scaling"] == {k: v for k, v in stated.items() if k != "type"} | {
            "rope_type": "yarn"
        }


@pytest.mark.parametrize("name", RELEASED)
def test_both_rotary_spellings_are_read(name: str) -> None:
    config = dict(RELEASED[name])
    old = config.pop("rope_scaling", None) or {"rope_type": "default"}
    new = {("rope_type" if k == "type" else k): v for k, v in old.items()} | {
        "rope_theta": config.pop("rope_theta")
    }
    assert spec_of(config | {"rope_parameters": new}) == spec_of(RELEASED[name])


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A small config.json of any family with experts."""
    family = draw(st.sampled_from(FAMILIES))
    layers, groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    used = draw(st.integers(1, groups))
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "num_experts_per_tok": draw(st.integers(1, used * size)),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": 5000.0,
        "rope_scaling": draw(st.sampled_from([None, yarn(0.5)])),
    }
    optional: dict[str, st.SearchStrategy[Any]]
    if family.startswith("deepseek"):
        config |= {
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": groups * size,
            "n_group": groups,
            "topk_group": used,
            "moe_intermediate_size": 12,
            "q_lora_rank": draw(st.sampled_from([None, 6])),
            "first_k_dense_replace": draw(st.integers(0, layers)),
        }
        optional = {
            "attention_bias": st.booleans(),
            "n_shared_experts": st.integers(0, 2),
            "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
        }
        if family == "deepseek_v2":
            optional |= {"topk_method": st.sampled_from(["greedy", "group_limited_greedy"])}
        else:
            optional |= {"norm_topk_prob": st.booleans(), "rope_interleave": st.booleans()}
            if config["first_k_dense_replace"] < layers:
                optional |= {"num_nextn_predict_layers": st.integers(0, 2)}
            else:
                config["num_nextn_predict_layers"] = 0
    elif family == "qwen3_moe":
        config |= {"num_experts": groups * size, "moe_intermediate_size": 12}
        optional = {
            "norm_topk_prob": st.booleans(),
            "decoder_sparse_step": st.integers(1, 4),
            "mlp_only_layers": st.lists(st.integers(0, layers - 1), max_size=3, unique=True),
            "attention_bias": st.booleans(),
            "head_dim": st.sampled_from([8, 12]),
        }
        if draw(st.booleans()):
            config |= {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 80))}
    else:
        config |= {"num_local_experts": groups * size}
        optional = {
            "sliding_window": st.one_of(st.none(), st.integers(1, 80)),
            "head_dim": st.sampled_from([8, 12]),
        }
    return config | draw(st.fixed_dictionaries({}, optional=optional))


@settings(max_examples=40)
@given(configs())
def test_config_to_spec_to_config_keeps_the_meaning(config: dict[str, Any]) -> None:
    reader, spec = find(config), spec_of(config)
    written = reader.to_config(spec)
    assert meaning(spec_of(written)) == meaning(spec)
    assert reader.to_config(spec_of(written)) == written
    assert Spec.from_toml(spec.to_toml()) == spec
    assert {n for t in reader.rules(spec) if t.ours for n in t.ours.names} == spec.plan.tensors.keys()


# What transformers reads of a config and does not follow from the rest.
NUMERICS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_interleave",
    "sliding_window",
)
EXPERTS = (
    "num_experts_per_tok",
    "num_local_experts",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "norm_topk_prob",
    "routed_scaling_factor",
)


@settings(max_examples=25)
@given(configs())
def test_transformers_sees_the_same_model_in_what_is_written(config: dict[str, Any]) -> None:
    """Independent of our reading: the family's own config class fills in its defaults for both."""
    reader = find(config)
    written = reader.to_config(spec_of(config))
    cls = getattr(transformers, reader.architectures[0].replace("ForCausalLM", "Config"))

    def seen(found: dict[str, Any]) -> dict[str, Any]:
        made = cls(**{k: v for k, v in found.items() if k not in ("model_type", "architectures")})
        view = {name: getattr(made, name, None) for name in NUMERICS}
        layers = range(made.num_hidden_layers)
        if reader.name == "qwen3_moe":
            step, dense = made.decoder_sparse_step, made.mlp_only_layers
            sparse = [layer not in dense and (layer + 1) % step == 0 for layer in layers]
        else:
            sparse = [layer >= getattr(made, "first_k_dense_replace", 0) for layer in layers]
        view["sparse"] = sparse
        if any(sparse):
            view |= {name: getattr(made, name, None) for name in EXPERTS}
            if reader.name == "deepseek_v2":
                view["topk_method"] = made.topk_method
            groups = (getattr(made, "n_group", None), getattr(made, "topk_group", None))
            if reader.name == "deepseek_v2" and (view["topk_method"] == "greedy" or groups == (1, 1)):
                # One group is no group.
                view["topk_method"], groups = "greedy", (None, None)
            view["groups"] = groups
        if not all(sparse) or reader.name == "mixtral":
            view["intermediate_size"] = made.intermediate_size
        rotary: dict[str, Any] = {k: v for k, v in dict(made.rope_parameters).items() if k != "type"}
        return view | {"rotary": rotary, "head_dim": getattr(made, "head_dim", None) or 8}

    assert seen(written) == seen(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_fields_are_all_refused_by_name(family: str) -> None:
    with pytest.raises(DialectError) as caught:
        spec_of(of(family, attn_logit_softcapping=50.0, n_experts_per_tok=2))
    named = {line.split(" = ")[0] for line in caught.value.lines}
    assert named == {"attn_logit_softcapping", "n_experts_per_tok"}


@pytest.mark.parametrize("family", FAMILIES)
def test_how_weights_are_stored_is_no_matter_of_the_architecture(family: str) -> None:
    fp8 = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    for table in (fp8, None):
        assert spec_of(of(family, quantization_config=table)) == spec_of(of(family))
    for table, words in (
        ({"quant_method": "gptq", "bits": 4}, "these weights can not be read; quant_method must be fp8"),
        ({**fp8, "fmt": "e5m2"}, 'quantization_config.fmt = "e5m2": must be "e4m3"'),
    ):
        with pytest.raises(DialectError, match=words) as caught:
            spec_of(of(family, quantization_config=table))
        assert len(caught.value.lines) == 1


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func = "softmax": must be "sigmoid"'),
        ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method = "greedy": must be "noaux_tc"'),
        ("deepseek_v3", {"hidden_act": "gelu"}, "hidden_act = .gelu.: must be one of silu"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2: must be 1"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads = 8: must be 128"),
        ("deepseek_v3", {"head_dim": 192}, "head_dim = 192: must be 64"),
        ("deepseek_v3", {"qk_head_dim": 128}, "qk_head_dim = 128: must be 192"),
        ("deepseek_v3", {"rope_interleave": "true"}, "rope_interleave = .true.: must be one of true, false"),
        ("deepseek_v3", {"rope_interleave": 1}, "rope_interleave = 1: must be one of true, false"),
        ("deepseek_v3", {"num_mtp_layers": 2}, "num_nextn_predict_layers = 1 and num_mtp_layers = 2: which"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace = -1: must be a count"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, 'must be "softmax"'),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, 'must be one of "greedy", "group_limited_greedy"'),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = true: must be false"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias = true: must be false"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok = null: must have a value"),
        ("deepseek_v2", {"rope_interleave": True}, "rope_interleave = true: deepseek_v2 does not know"),
        (
            "qwen3_moe",
            {"num_local_experts": 4},
            "num_experts = 128 and num_local_experts = 4: which is meant",
        ),
        ("qwen3_moe", {"mlp_only_layers": [4]}, "must be a list of layer numbers below 4"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "must be one of silu"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 8},
            "max_window_layers = 48: must be 0",
        ),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1: must be 0.0"),
        ("mixtral", {"attention_bias": True}, "attention_bias = true: mixtral does not know"),
    ],
)
def test_a_value_that_could_change_the_model_is_refused(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(DialectError, match=words):
        spec_of(of(family, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, r"top_k = 9: must be <= num_experts \(8\)"),
        ("deepseek_v3", {"n_group": 7}, r"num_groups = 7: must divide num_experts \(256\)"),
        ("deepseek_v3", {"topk_group": 9}, r"top_k_groups = 9: must be <= num_groups \(8\)"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank = 0"),
        ("deepseek_v3", {"num_nextn_predict_layers": -1}, "depth = -1"),
    ],
)
def test_values_that_make_no_model_are_told_by_the_spec(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        spec_of(of(family, **changes))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_norms_of_latents_have_an_eps_of_their_own(family: str) -> None:
    """transformers and the released code fix it, whatever rms_norm_eps says."""
    spec = spec_of(of(family, rms_norm_eps=1e-4))
    layer = spec.plan.layers[-1]
    assert layer["mixer"].children["kv_a_norm"].part.config.eps == 1e-6
    assert layer["residual"].children["ffn_norm"].part.config.eps == 1e-4
    assert find(of(family)).to_config(spec)["rms_norm_eps"] == 1e-4
    other: Any = spec.document.data["norm"]
    latent = next(name for name, table in other.items() if table["eps"] == 1e-6)
    changed = spec.with_(norm={latent: {"eps": 1e-5}})
    with pytest.raises(DialectError, match=r"mixer\.norm\.eps must be 1e-06 in deepseek_v., but 1e-05"):
        find(of(family)).to_config(changed)


def test_groups_count_only_where_the_choice_is_limited_to_them() -> None:
    greedy = spec_of(of("deepseek_v2", n_group=8, topk_group=3, topk_method="greedy"))
    assert greedy == spec_of(of("deepseek_v2", n_group=None, topk_group=None, topk_method="greedy"))
    limited = of("deepseek_v2", n_group=8, topk_group=3, topk_method="group_limited_greedy")
    router = spec_of(limited).plan.layers[-1]["ffn"].children["router"].part.config
    assert (router.num_groups, router.top_k_groups, router.group_score) == (8, 3, "max")
    assert find(limited).to_config(spec_of(limited))["topk_method"] == "group_limited_greedy"


def test_experts_have_either_name() -> None:
    new = {("num_local_experts" if k == "num_experts" else k): v for k, v in of("qwen3_moe").items()}
    assert "num_experts" not in new
    assert spec_of(new) == spec_of(of("qwen3_moe"))
    assert spec_of(of("mixtral", num_experts=8)) == spec_of(of("mixtral"))


def test_dense_layers_are_where_the_family_says() -> None:
    def kinds(config: dict[str, Any]) -> list[str]:
        return [layer["ffn"].part.kind for layer in spec_of(config).plan.layers]

    assert kinds(of("deepseek_v3", first_k_dense_replace=3)) == ["swiglu"] * 3 + ["moe"]
    assert kinds(of("qwen3_moe", decoder_sparse_step=2)) == ["swiglu", "moe"] * 2
    assert kinds(of("qwen3_moe", mlp_only_layers=[2])) == ["moe", "moe", "swiglu", "moe"]
    assert kinds(of("mixtral")) == ["moe"] * 4


def test_balance_weights_are_training_and_only_v2_says_them() -> None:
    def alpha(config: dict[str, Any]) -> float:
        found: float = spec_of(config).plan.layers[-1]["ffn"].children["router"].part.config.balance_alpha
        return found

    assert alpha(of("deepseek_v2")) == 0.001
    assert alpha(of("deepseek_v2", aux_loss_alpha=None)) == 0.0
    assert alpha(of("qwen3_moe")) == 0.0
    assert (
        spec_of(of("deepseek_v2")).fingerprint == spec_of(of("deepseek_v2", aux_loss_alpha=0.5)).fingerprint
    )


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("tiny-deepseek-v3", {"ffn": {"experts": {"router": {"group_score": "max"}}}}, "group_score must be"),
        ("tiny-deepseek-v3", {"mixer": {"mla": {"window": 8}}}, r"mixer\.window is 8"),
        ("tiny-deepseek-v3", {"ffn": {"dense": {"activation": "gelu"}}}, "activation"),
        ("mixtral-8x7b", {"ffn": {"experts": {"num_shared_experts": 1}}}, "num_shared_experts is 1"),
        ("mixtral-8x7b", {"ffn": {"experts": {"router": {"routed_scaling_factor": 2.0}}}}, "routed_scaling"),
        (
            "qwen3-30b-a3b",
            {"ffn": {"experts": {"router": {"num_groups": 4, "top_k_groups": 2}}}},
            "num_groups",
        ),
    ],
)
def test_what_a_family_can_not_say_is_told_with_path_and_values(
    name: str, changes: dict[str, Any], words: str
) -> None:
    spec = Spec.load(name)
    with pytest.raises(DialectError, match=words):
        expressing(spec)[0].to_config(spec.with_(**changes))


def test_what_qwen3_coder_says_besides_changes_nothing() -> None:
    said = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
    assert spec_of(of("qwen3_moe", **said)) == spec_of(of("qwen3_moe"))
    for key, value in (("use_qk_norm", False), ("qkv_bias", True), ("shared_expert_intermediate_size", 8)):
        with pytest.raises(DialectError, match=f"{key} = .*: must be"):
            spec_of(of("qwen3_moe", **{key: value}))


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda below: st.one_of(
        st.lists(below, max_size=3), st.dictionaries(st.text(max_size=6), below, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=80)
@given(configs(), st.data())
def test_any_value_anywhere_is_read_or_refused_in_words(config: dict[str, Any], data: st.DataObject) -> None:
    known = [key.theirs for key in find(config).family.keys if "." not in key.theirs]
    known += [key for pattern in find(config).family.patterns for key in pattern.keys]
    key = data.draw(st.sampled_from([*known, "rope_scaling"]).filter(lambda k: k != "num_hidden_layers"))
    spoilt = config | {key: data.draw(values)}
    try:
        find(config).rules(spec_of(spoilt))
    except (DialectError, SpecError) as error:
        told = error.lines
    else:
        told = ("read",)
    assert told
    assert all(line and "\n" not in line for line in told)
