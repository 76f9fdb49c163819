"""Folders of models with experts and a predictor: compared, exported, and refused in the words that help."""

from pathlib import Path

import pytest

import composeformer as cf
from composeformer.errors import DialectError
from composeformer.folder import strict_json
from composeformer.spec import Spec
from composeformer.store import verify

SPEC = Spec.load("tiny-deepseek-v3")


def saved(spec: Spec, path: Path) -> Path:
    cf.save(cf.build(spec, seed=0), path)
    return path


def test_another_depth_differs_in_the_predictor_alone(tmp_path: Path) -> None:
    one = saved(SPEC, tmp_path / "one")
    two = saved(SPEC.with_({"predictor.depth": 2}), tmp_path / "two")
    data = SPEC.to_dict()
    del data["predictor"]
    none = saved(Spec.from_dict(data), tmp_path / "none")
    for other in (two, none):
        for a, b in ((one, other), (other, one)):
            found = verify(cf.load(a), cf.load(b))
            main = [each for each in found.outputs if not each.where.startswith("predictor")]
            assert len(main) > 20
            assert {each.relative for each in main} == {0.0}
            assert found.first is not None
            assert found.first.where.startswith("predictor")


def test_a_folder_goes_back_to_the_family_it_came_from(tmp_path: Path) -> None:
    # Without an expert layer DeepSeek-V2 could say it too.
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        first_k_dense_replace=2,
        num_nextn_predict_layers=0,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=8,
    )
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "theirs")
    cf.import_model(tmp_path / "theirs", tmp_path / "ours")
    assert cf.export_model(tmp_path / "ours", tmp_path / "back") == "deepseek_v3"
    for folder in ("ours", "back"):
        read, _ = strict_json.read(tmp_path / folder / "config.json")
        assert read["model_type"] == "deepseek_v3"


def test_the_nearest_family_says_why_it_can_not_and_the_others_only_that(tmp_path: Path) -> None:
    folder = saved(SPEC.with_({"norm.rms.eps": 1e-5}), tmp_path / "m")
    with pytest.raises(DialectError) as refused:
        cf.export_model(folder, tmp_path / "out")
    *near, others = refused.value.lines
    assert len(near) <= 2
    assert any("deepseek_v3: layers.0.mixer.norm.eps must be 1e-06" in line for line in near)
    assert others.endswith("further from it")


def test_a_stated_default_width_of_shared_experts_is_the_default() -> None:
    stated = SPEC.with_({"ffn.experts.shared_intermediate_size": 32})
    assert stated.fingerprint == SPEC.fingerprint
    assert SPEC.with_({"ffn.experts.shared_intermediate_size": 33}).fingerprint != SPEC.fingerprint
