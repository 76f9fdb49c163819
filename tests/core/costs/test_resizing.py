"""A resized spec is as near to what is held as whole multiples allow, and is a spec that can be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.costs import cost
from composeformer.costs.resizing import HELD, read_swap, resize
from composeformer.errors import ComposeError, InputError
from composeformer.spec import Spec

LATENT = {
    "kind": "mla",
    "num_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
FFN = "ffn.dense.intermediate_size"


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    rank=st.integers(4, 48),
    hold=st.sampled_from(["active", "total", "flops"]),
    multiple=st.sampled_from([1, 8, 16]),
)
def test_no_other_multiple_comes_nearer(heads: int, rank: int, hold: str, multiple: int) -> None:
    before = Spec.load("tiny-llama")
    found = resize(
        before,
        swaps={"mixer": {**LATENT, "num_heads": heads, "kv_lora_rank": rank}},
        hold=hold,
        multiple=multiple,
    )
    measure, _ = HELD[hold]
    assert found.wanted == measure(before)
    assert found.found == measure(found.spec)
    old, new = found.widths[FFN]
    assert old == 176
    assert new % multiple == 0
    for other in (new - multiple, new + multiple):
        if other > 0:
            apart = abs(measure(found.spec.with_({FFN: other})) - found.wanted)
            assert apart >= abs(found.found - found.wanted)


def test_what_is_held_already_changes_nothing() -> None:
    found = resize(Spec.load("tiny-llama"), hold="active")
    assert found.widths == {FFN: (176, 176)}
    assert found.deviation == 0
    assert found.spec.fingerprint == Spec.load("tiny-llama").fingerprint


def test_the_swapped_part_is_in_every_layer_and_the_new_spec_stands_alone() -> None:
    found = resize(
        Spec.load("tiny-deepseek-v3"), swaps={"mixer": {"kind": "gqa", "num_heads": 4}}, hold="flops"
    )
    kinds = {node.part.kind for node in found.spec.plan.nodes() if node.slot == "mixer"}
    assert kinds == {"gqa"}
    again = Spec.from_toml(found.spec.to_toml())
    assert again.fingerprint == found.spec.fingerprint
    # Dense and expert widths keep their proportion, as far as multiples allow.
    (dense, experts) = found.widths.values()
    assert dense[1] / dense[0] == pytest.approx(experts[1] / experts[0], rel=0.3)


def test_the_cache_is_held_by_a_width_that_it_depends_on() -> None:
    found = resize(
        Spec.load("tiny-llama"),
        swaps={"mixer": {**LATENT, "kind": "mla"}},
        hold="cache",
        solve=["mixer.kv_lora_rank"],
        multiple=1,
    )
    assert cost(found.spec).cache_bytes_per_token == cost("tiny-llama").cache_bytes_per_token
    with pytest.raises(InputError, match="do not change what is held; name others with --solve"):
        resize(Spec.load("tiny-llama"), hold="cache")


def test_a_price_is_held_through_its_operations() -> None:
    priced = Spec.load("tiny-llama").with_(cost={"tokens": 1e12})
    by_cost, by_flops = (
        resize(priced, swaps={"mixer": LATENT}, hold=hold, multiple=1) for hold in ("cost", "flops")
    )
    assert by_cost.widths == by_flops.widths
    with pytest.raises(InputError, match=r"--hold cost: needs cost.tokens"):
        resize(Spec.load("tiny-llama"), hold="cost")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"hold": "activ"},
            "--hold activ: must be one of active, total, flops, cache, cost; did you mean 'active'?",
        ),
        ({"swaps": {"mixr": LATENT}}, "--swap mixr: is no slot"),
        ({"swaps": {"mixer": {"kind": "mla"}}}, "is required"),
        (
            {"solve": ["ffn.dense.intermediat_size"]},
            "the spec has no such value; did you mean 'ffn.dense.intermediate",
        ),
        ({"solve": ["ffn.dense.activation"]}, "is no width; name an integer field"),
        ({"swaps": {"mixer": {**LATENT, "kv_lora_rank": 10_000}}}, "even the narrowest widths make more"),
    ],
)
def test_what_can_not_be_solved_is_one_clear_error(more: dict[str, Any], told: str) -> None:
    with pytest.raises(ComposeError) as refused:
        resize(Spec.load("tiny-llama"), **more)
    assert told in str(refused.value)


def test_a_swap_is_a_file_or_a_table(tmp_path: Path) -> None:
    file = tmp_path / "mla.toml"
    file.write_text('[position.mine]\nkind = "rope"\n[mixer.latent]\nkind = "mla"\n')
    assert read_swap(f"mixer={file}") == {
        "position": {"mine": {"kind": "rope"}},
        "mixer": {"latent": {"kind": "mla"}},
    }
    assert read_swap('mixer={kind = "mla"}') == {"mixer": {"kind": "mla"}}
    file.write_text('kind = "mla"\n')
    assert read_swap(f"mixer={file}") == {"mixer": {"kind": "mla"}}
    with pytest.raises(InputError, match="must be SLOT=FILE"):
        read_swap("mixer")
    file.write_text('[ffn]\nkind = "swiglu"\n')
    with pytest.raises(InputError, match="the file has no table mixer; it has ffn"):
        read_swap(f"mixer={file}")
    with pytest.raises(ComposeError, match="no such file"):
        read_swap(f"mixer={tmp_path / 'none.toml'}")


def test_the_command_writes_a_spec_that_can_be_used(
    compose: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    new = tmp_path / "new.toml"
    sizes = "num_heads = 4, kv_lora_rank = 16, qk_nope_head_dim = 16, qk_rope_head_dim = 8, v_head_dim = 16"
    swap = f'mixer={{kind = "mla", {sizes}}}'
    given = ("resize", "tiny-llama", "--swap", swap, "--hold", "flops")
    code, out, _ = compose(*given, "-o", str(new))
    assert code == 0
    assert "training operations of a token: " in out
    assert Spec.load(new).plan.layers[0]["mixer"].part.kind == "mla"
    code, out, err = compose(*given, "-o", str(new))
    assert (code, out) == (2, "")
    assert "exists already" in err
    code, out, err = compose(*given)
    assert Spec.from_toml(out).fingerprint == Spec.load(new).fingerprint
    assert "becomes" in err
    code, out, _ = compose(*given, "--json")
    assert json.loads(out)["held"] == "flops"


def test_a_price_that_is_set_is_of_both(compose: Callable[..., tuple[int, str, str]]) -> None:
    """Without it there would be no price to hold: the old spec states none."""
    given = (
        "resize",
        "tiny-llama",
        "--hold",
        "cost",
        "--set",
        "cost.tokens=1e9",
        "--set",
        "ffn.dense.bias=true",
    )
    code, out, err = compose(*given, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["wanted"] == pytest.approx(found["found"], rel=0.01)
    assert found["spec"]["ffn"]["dense"]["bias"] is True
