"""Foreign configs read and written: meaning survives, transformers agrees, the unknown is refused by name."""

import re
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.dialects import Dialect, expressing, find, load_all
from composeformer.errors import DialectError, SpecError
from composeformer.spec import Spec
from composeformer.spec.fingerprint import meaning

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MISSING = object()


def dialect(name: str) -> Dialect:
    return next(d for d in load_all() if d.name == name)


def basic(family: str, **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "head_dim": 8,
    } | changes
    return {key: value for key, value in config.items() if value is not MISSING}


def spec_of(config: dict[str, Any]) -> Spec:
    return Spec.from_dict(find(config).to_spec(config))


number = st.floats(1.0, 64.0).map(lambda x: round(x, 3))
extensions = st.one_of(
    st.just({"rope_type": "default"}),
    st.builds(lambda f: {"rope_type": "linear", "factor": f}, number),
    st.builds(
        lambda f, low, more, n: {
            "rope_type": "llama3",
            "factor": f,
            "low_freq_factor": low,
            "high_freq_factor": low + more,
            "original_max_position_embeddings": n,
        },
        number,
        number,
        number,
        st.integers(1, 63),
    ),
    st.builds(
        lambda f, n, optional: (
            {"rope_type": "yarn", "factor": f, "original_max_position_embeddings": n} | optional
        ),
        number,
        st.integers(1, 63),
        st.fixed_dictionaries(
            {},
            optional={
                "beta_fast": st.integers(8, 64),
                "beta_slow": st.integers(1, 8),
                "attention_factor": number,
                "mscale": number,
                "mscale_all_dim": number,
                "truncate": st.booleans(),
            },
        ),
    ),
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json of any family, old spelling or new, with keys left out and nulls where they may be."""
    family = draw(st.sampled_from(FAMILIES))
    layers, kv = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    heads = kv * draw(st.integers(1, 3))
    optional: dict[str, st.SearchStrategy[Any]] = {
        "hidden_act": st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"]),
        "rms_norm_eps": st.sampled_from([1e-5, 1e-6, 3.3e-7]),
        "initializer_range": st.sampled_from([0.02, 0.01]),
        "tie_word_embeddings": st.booleans(),
        "torch_dtype": st.sampled_from(["bfloat16", "float32"]),
        "bos_token_id": st.one_of(st.none(), st.integers(0, 3)),
        "transformers_version": st.just("4.40.0"),
        "use_cache": st.booleans(),
        "attention_dropout": st.just(0.0),
        "head_dim": st.sampled_from([2, 8, 16]),
    }
    if family == "llama":
        optional |= {"attention_bias": st.booleans(), "mlp_bias": st.booleans(), "pretraining_tp": st.just(1)}
    if family == "mistral":
        optional |= {"sliding_window": st.one_of(st.none(), st.integers(1, 100))}
    if family == "qwen3":
        optional |= {"attention_bias": st.booleans()}
    if family.startswith("qwen"):
        kinds = st.sampled_from(["sliding_attention", "full_attention"])
        sliding = draw(st.booleans())
        optional |= {"max_window_layers": st.integers(0, 8)}
        fixed = {
            "use_sliding_window": sliding,
            "sliding_window": draw(st.integers(1, 100)) if sliding else None,
        }
        if draw(st.booleans()) and sliding:
            optional |= {"layer_types": st.lists(kinds, min_size=layers, max_size=layers)}
    else:
        fixed = {}
    config = basic(
        family,
        hidden_size=heads * 4 * draw(st.integers(1, 3)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([kv, None] if family != "mistral" else [kv])),
        **({"head_dim": MISSING} | draw(st.fixed_dictionaries({}, optional=optional)) | fixed),
    )
    rotary, theta = draw(extensions), draw(st.sampled_from([1e4, 5e5, 10000]))
    if draw(st.booleans()):
        return config | {"rope_parameters": rotary | {"rope_theta": theta}}
    old = {"type" if k == "rope_type" and draw(st.booleans()) else k: v for k, v in rotary.items()}
    return config | {"rope_theta": theta, "rope_scaling": None if rotary["rope_type"] == "default" else old}


@settings(max_examples=40, deadline=None)
@given(configs())
def test_config_to_spec_to_config_keeps_the_meaning(config: dict[str, Any]) -> None:
    reader = find(config)
    spec = spec_of(config)
    written = reader.to_config(spec)
    assert meaning(spec_of(written)) == meaning(spec)
    assert reader.to_config(spec_of(written)) == written
    assert Spec.from_toml(spec.to_toml()) == spec


NUMERICS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "layer_types",
)


@settings(max_examples=25, deadline=None)
@given(configs())
def test_transformers_sees_the_same_model_in_what_is_written(config: dict[str, Any]) -> None:
    """Independent of our reading: the family's own config class fills in its defaults for both."""
    written = find(config).to_config(spec_of(config))
    cls = getattr(transformers, config["architectures"][0].replace("ForCausalLM", "Config"))

    def seen(found: dict[str, Any]) -> dict[str, Any]:
        made = cls(**{k: v for k, v in found.items() if k not in ("model_type", "architectures")})
        view = {name: getattr(made, name, None) for name in NUMERICS}
        view["head_dim"] = getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads
        if "sliding_attention" not in (view["layer_types"] or ["sliding_attention"]):
            view["sliding_window"] = None
        rotary: dict[str, Any] = {
            k: v for k, v in dict(made.rope_parameters).items() if v is not None and k != "type"
        }
        if rotary["rope_type"] == "yarn":
            rotary = {"beta_fast": 32, "beta_slow": 1, "truncate": True} | rotary
        return view | {"rotary": rotary}

    assert seen(written) == seen(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_fields_are_all_refused_by_name(family: str) -> None:
    config = basic(
        family, attn_logit_softcapping=50.0, residual_multiplier=0.2, quantization_config={"bits": 4}
    )
    with pytest.raises(DialectError) as caught:
        spec_of(config)
    named = {line.split(" = ")[0] for line in caught.value.lines}
    assert named == {"attn_logit_softcapping", "residual_multiplier", "quantization_config"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1: must be 0.0"),
        ({"hidden_act": "mish"}, "hidden_act = .mish.: must be one of silu"),
        ({"hidden_size": None}, "hidden_size = null"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000: must be an integer between"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers = .4.: must be an integer between"),
        ({"num_hiden_layers": 4}, "did you mean 'num_hidden_layers'"),
        ({"architectures": ["OddForCausalLM"]}, "architectures = "),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = .dynamic.: must be one of"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type = .longrope.: must be one of"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "which is meant"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_parameters.factor is required"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
            "beta_fast = 3: has a meaning only",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
            "factor = 2.0: has a meaning only when",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}},
            "rope_parameters.mrope_section",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 2e4},
            "rope_theta is 20000.0 and|and 20000.0",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: must be 1.0"),
        ({"rope_scaling": "linear"}, "must be a table or null"),
    ],
)
def test_a_value_that_could_change_the_model_is_refused(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(DialectError, match=words):
        spec_of(basic(family, **changes))


def test_a_default_that_can_not_be_computed_names_what_it_needs() -> None:
    with pytest.raises(DialectError, match=r"hidden_size // num_heads has no value .* num_heads = .four."):
        spec_of(basic("llama", head_dim=None, num_attention_heads="four"))


def test_both_spellings_must_agree() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    both = basic("llama", rope_scaling=yarn, rope_theta=1e4, rope_parameters=yarn | {"rope_theta": 1e4})
    assert spec_of(both) == spec_of(basic("llama", rope_scaling=yarn, rope_theta=1e4))
    with pytest.raises(
        DialectError, match=re.escape("factor is 8.0 in rope_parameters and 4.0 in rope_scaling")
    ):
        spec_of(both | {"rope_parameters": yarn | {"factor": 8.0}})


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda below: st.one_of(
        st.lists(below, max_size=3), st.dictionaries(st.text(max_size=6), below, max_size=3)
    ),
    max_leaves=4,
)
SPOILT = (
    "num_hidden_layers",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "use_sliding_window",
)


@settings(max_examples=60, deadline=None)
@given(configs(), st.data())
def test_any_value_anywhere_is_read_or_refused_in_words(config: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([*SPOILT, *config]).filter(lambda k: k != "model_type"))
    found = data.draw(values)
    rotary = config.get(key)
    if isinstance(rotary, dict) and data.draw(st.booleans()):
        found = rotary | {data.draw(st.sampled_from([*rotary, "mscale", "type"])): found}
    try:
        spec_of(config | {key: found})
    except (DialectError, SpecError) as error:
        told = error.lines
    else:
        told = ("read",)
    assert told
    assert all(line and "\n" not in line for line in told)


def test_class_defaults_fill_what_config_json_leaves_out() -> None:
    spec = spec_of({"model_type": "mistral"})
    assert (len(spec.layers), spec.model.vocab_size, spec.model.hidden_size) == (32, 32000, 4096)
    mixer = spec.plan.layers[0]["mixer"].part.config
    assert (mixer.num_kv_heads, mixer.head_dim, mixer.window) == (8, 128, 4096)


def test_a_family_is_chosen_by_its_model_type() -> None:
    assert find({"model_type": "qwen3"}).name == "qwen3"
    with pytest.raises(DialectError, match="did you mean 'mistral'"):
        find({"model_type": "mistrall"})
    with pytest.raises(DialectError, match="no dialect reads this"):
        find({})


PLAIN: dict[str, Any] = {
    "model": {"vocab_size": 60, "hidden_size": 16, "max_position_embeddings": 32},
    "norm": {"kind": "rmsnorm"},
    "position": {"kind": "rope"},
    "mixer": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2},
    "ffn": {"kind": "swiglu", "intermediate_size": 24},
    "layers": [{"repeat": 2}],
}


def test_a_plain_spec_is_said_by_the_first_family_that_can() -> None:
    found, config = expressing(Spec.from_dict(PLAIN))
    assert found.name == "llama"
    assert meaning(spec_of(config)) == meaning(Spec.from_dict(PLAIN))
    assert (config["head_dim"], config["tie_word_embeddings"], config["rms_norm_eps"]) == (4, False, 1e-6)


def test_families_say_what_llama_can_not() -> None:
    biased = PLAIN | {"mixer": PLAIN["mixer"] | {"qkv_bias": True}}
    assert expressing(Spec.from_dict(biased))[0].name == "qwen2"
    windows = PLAIN | {"mixer": PLAIN["mixer"] | {"window": 8}}
    assert expressing(Spec.from_dict(windows))[0].name == "mistral"
    normed = PLAIN | {"mixer": PLAIN["mixer"] | {"qk_norm": "norm"}}
    assert expressing(Spec.from_dict(normed))[0].name == "qwen3"
    some = biased | {"layers": [{}, {"mixer": {"use": "mixer", "window": 8}}, {}]}
    found, config = expressing(Spec.from_dict(some))
    assert found.name == "qwen2"
    assert config["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("changes", "family", "words"),
    [
        ({"mixer": PLAIN["mixer"] | {"sinks": True}}, "llama", "layers.0.mixer.sinks is true"),
        ({"mixer": PLAIN["mixer"] | {"cap": 30.0}}, "qwen2", "qkv_bias must be true"),
        ({"mixer": PLAIN["mixer"] | {"o_bias": True}}, "llama", "qkv_bias = false and .*o_bias = true"),
        ({"head": {"kind": "linear", "scale": 0.5}}, "llama", "head.scale is 0.5"),
        ({"position": {"kind": "rope", "fraction": 0.5}}, "llama", "position.fraction is 0.5"),
        ({"position": {"kind": "none"}}, "llama", "no word for it"),
        (
            {"norm": {"kind": "layernorm"}},
            "llama",
            'residual.norm.kind must be "rmsnorm" in llama, but "layernorm"',
        ),
        (
            {"layers": [{"ffn": False}, {}]},
            "llama",
            'layers.0.ffn.kind must be "swiglu" in llama, but there is none',
        ),
        ({"ffn": PLAIN["ffn"] | {"gated": False}}, "llama", "ffn.gated is false"),
        (
            {"layers": [{}, {"mixer": {"use": "mixer", "num_heads": 8}}]},
            "llama",
            "has one num_attention_heads",
        ),
    ],
)
def test_what_a_family_can_not_say_is_told_with_path_and_values(
    changes: dict[str, Any], family: str, words: str
) -> None:
    with pytest.raises(DialectError, match=words):
        dialect(family).to_config(Spec.from_dict(PLAIN | changes))


def test_no_dialect_is_told_with_the_reasons_of_each() -> None:
    odd = Spec.from_dict(PLAIN | {"mixer": PLAIN["mixer"] | {"sinks": True}})
    with pytest.raises(DialectError) as caught:
        expressing(odd)
    assert {line.split(":")[0] for line in caught.value.lines} >= set(FAMILIES)


def test_gguf_is_read_and_not_written() -> None:
    with pytest.raises(DialectError, match="is read, not written"):
        dialect("gguf-llama").to_config(Spec.from_dict(PLAIN))


def test_values_that_a_spec_refuses_are_told_by_the_spec() -> None:
    with pytest.raises(SpecError, match="intermediate_size"):
        spec_of(basic("llama", intermediate_size=-3))


SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}


def test_a_released_config_is_the_shipped_spec() -> None:
    assert spec_of(SMOLLM2).fingerprint == Spec.load("smollm2-135m").fingerprint


@pytest.mark.parametrize(
    ("name", "family"),
    [("llama-2-7b", "llama"), ("llama-3.1-405b", "llama"), ("qwen2.5-72b", "qwen2"), ("tiny-llama", "llama")],
)
def test_shipped_specs_are_said_in_their_family(name: str, family: str) -> None:
    spec = Spec.load(name)
    found, config = expressing(spec)
    assert found.name == family
    assert spec_of(config).fingerprint == spec.fingerprint
