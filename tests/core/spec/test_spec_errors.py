"""What is wrong in a spec is told with file, line, path, what was found, what is allowed, and the nearest name.

Shipped specs are mutated in every key: nothing wrong is accepted, nothing raises but SpecError, and the
mutated line is named.
"""

import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from composeformer.cli import main
from composeformer.cli.check_command import command
from composeformer.errors import SpecError, nearest
from composeformer.spec import Spec, shipped

TEXTS = {name: (files("composeformer") / "specs" / f"{name}.toml").read_text("utf-8") for name in shipped()}
# Keys that may be left out: they have defaults, or the spec's only component is meant.
OPTIONAL = {"format", "name", "description", "source", "unverified", "repeat", "eps", "theta", "num_kv_heads"}
OPTIONAL |= {"head_dim", "position", "mixer", "ffn", "tie_embeddings", "qkv_bias"}
OPTIONAL |= {"low_freq_factor", "high_freq_factor", "layout", "beta_fast", "beta_slow", "init_std"}
OPTIONAL |= {"q_lora_rank", "qk_norm", "normalize", "softmax", "routed_scaling_factor", "top_k_groups"}
OPTIONAL |= {"group_score", "depth"}
# How a run is laid out and priced.
OPTIONAL |= {"batch_size", "sequence_length", "micro_batches", "pipeline", "expert", "shard", "zero", "schedule"}
OPTIONAL |= {"recompute", "hardware", "gpus", "tokens", "context", "utilisation", "gpu_hours", "year"}
# These may be 0, too.
FROM_ZERO = {"mscale", "mscale_all_dim", "num_shared_experts", "bias_update_speed", "sequence_balance_alpha"}
FROM_ZERO |= {"balance_alpha", "z_alpha", "loss_weight", "zero", "other_gpu_hours"}
OPTIONAL |= FROM_ZERO


@attrs.frozen
class Line:
    """A `key = value` line of a shipped spec; `number` counts from 1."""

    spec: str
    number: int
    table: str
    key: str
    value: str

    @property
    def path(self) -> str:
        return f"{self.table}.{self.key}".lstrip(".")

    def replaced(self, *lines: str) -> str:
        texts = TEXTS[self.spec].splitlines()
        texts[self.number - 1 : self.number] = lines
        return "\n".join(texts) + "\n"


def key_lines() -> list[Line]:
    found = []
    for spec, text in TEXTS.items():
        table, entries = "", 0
        for number, line in enumerate(text.splitlines(), 1):
            if header := re.fullmatch(r"\[\[layers\]\]", line):
                table, entries = f"layers.{entries}", entries + 1
            elif header := re.fullmatch(r"\[([^\[\]]+)\]", line):
                table = header[1]
            elif pair := re.fullmatch(r"(\w+) = (.+)", line):
                found.append(Line(spec, number, table, pair[1], pair[2]))
    return found


LINES = key_lines()


def check(path: Path, text: str) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of `compose check`, its summary left out."""
    path.write_text(text, "utf-8")
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()):
        code = command.main([str(path)], standalone_mode=False)
    lines = errors.getvalue().splitlines()
    return code, [line for line in lines if not re.search(r": \d+ problems$", line)]


def refused(path: Path, text: str, number: int) -> list[str]:
    """The lines of `compose check` about a line of the file; asserts that it was refused as it should be."""
    code, lines = check(path, text)
    assert code == 2
    assert all(line.startswith("compose: ") and line.isprintable() for line in lines)
    about = [line for line in lines if line.startswith(f"compose: {path}:{number}: ")]
    assert about, lines
    return about


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("specs") / "mutated.toml"


def test_there_is_something_to_mutate() -> None:
    assert len(LINES) > 100


@st.composite
def typos(draw: st.DrawFn, word: str) -> str:
    """One letter dropped, doubled, or swapped with the next."""
    at = draw(st.integers(0, len(word) - 2))
    ways = [
        word[:at] + word[at + 1 :],
        word[: at + 1] + word[at:],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    ]
    return draw(st.sampled_from([way for way in ways if way != word]))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_misspelt_key_is_told_with_the_right_one(path: Path, data: st.DataObject) -> None:
    line = data.draw(st.sampled_from(LINES))
    typo = data.draw(typos(line.key))
    # A letter less can be as near to another key: qk_ope_head_dim to two.
    others = [SequenceMatcher(None, typo, other.key).ratio() for other in LINES if other.key != line.key]
    assume(SequenceMatcher(None, typo, line.key).ratio() > max(others))
    about = refused(path, line.replaced(f"{typo} = {line.value}"), line.number)
    assert any(told.endswith(f"did you mean '{line.key}'?") and typo in told for told in about), about


WRONG: dict[str, Callable[[str], list[str]]] = {
    "integer": lambda v: [f'"{v}"', f"{v}.0", f"{v}.9", "true", f"[{v}]", "{ x = 1 }", "2024-01-01"],
    "float": lambda v: [f'"{v}"', "true", f"[{v}]", "{ x = 1 }", "nan", "inf", "-inf"],
    "boolean": lambda v: ["0", "1", "1.0", f'"{v}"', f"[{v}]", "{ x = 1 }"],
    "string": lambda v: ["1", "1.5", "true", f"[{v}]", "{ x = 1 }", "12:00:00"],
    "list": lambda v: ["1", "true", '"x"', "[1]", "{ x = 1 }"],
}
RANGE = {"integer": ["0", "-1", str(2**41), str(2**62)], "float": ["0.0", "-1.0", "-0.0"]}


def sort_of(value: str) -> str:
    if value.startswith(('"', "[")):
        return "string" if value.startswith('"') else "list"
    if value in ("true", "false"):
        return "boolean"
    return "integer" if re.fullmatch(r"\d+", value) else "float"


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_value_of_another_type_or_out_of_range_is_refused_at_its_line(
    path: Path, data: st.DataObject
) -> None:
    """Nothing is coerced: "3", 3.9 and true are no integers, 1 is no boolean, true is no number."""
    line = data.draw(st.sampled_from(LINES))
    sort = sort_of(line.value)
    outside = [n for n in RANGE.get(sort, []) if line.key not in FROM_ZERO or float(n)]
    value = data.draw(st.sampled_from([*WRONG[sort](line.value), *outside]))
    about = refused(path, line.replaced(f"{line.key} = {value}"), line.number)
    assert any(f" {line.path}" in told for told in about), about


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_a_missing_key_is_refused_unless_it_has_a_default(path: Path, data: st.DataObject) -> None:
    # Without its number of groups a router's top_k_groups is what is wrong.
    line = data.draw(st.sampled_from([line for line in LINES if line.key != "num_groups"]))
    code, lines = check(path, line.replaced())
    marks = next((other.value for other in LINES if (other.spec, other.key) == (line.spec, "unverified")), "")
    several = len(re.findall(rf"(?m)^\[{line.key}\.\w+\]$", TEXTS[line.spec])) > 1
    if line.key in OPTIONAL and not several and f'"{line.path}"' not in marks:
        assert (code, lines) == (0, [])
    else:
        assert code == 2
        assert any(
            line.path in told or (line.key == "kind" and f" {line.table}: " in told) for told in lines
        ), lines


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_misspelt_kind_or_name_is_told_with_the_nearest(path: Path, data: st.DataObject) -> None:
    named = [line for line in LINES if line.key in ("kind", "position", "mixer", "ffn")]
    line = data.draw(st.sampled_from(named))
    word = line.value.strip('"')
    typo = data.draw(typos(word))
    about = refused(path, line.replaced(f'{line.key} = "{typo}"'), line.number)
    assert any(f'{line.path} = "{typo}"' in told and "allowed: " in told for told in about)
    if nearest(typo, [word]):
        assert any(f"did you mean '{word}'?" in told for told in about)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_misspelt_table_is_refused_at_its_line(path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TEXTS)))
    lines = TEXTS[name].splitlines()
    number = data.draw(st.sampled_from([n for n, line in enumerate(lines, 1) if line.startswith("[")]))
    word = re.findall(r"\w+", lines[number - 1])[0]
    typo = data.draw(typos(word))
    lines[number - 1] = lines[number - 1].replace(word, typo, 1)
    about = refused(path, "\n".join(lines), number)
    assert any(told.endswith(f"did you mean '{word}'?") for told in about), about


def test_all_problems_of_a_file_are_told_at_once_from_top_to_bottom(path: Path) -> None:
    text = """colour = "red"
[model]
vocab_size = 0
hidden_size = 30
max_position_embeddings = "8"
tie_embeddings = 1
init_std = true
[norm]
kind = "rmsnrm"
[mixer.a]
kind = "gqa"
num_heads = 4
num_kv_heads = 3.0
windw = 3
[ffn]
kind = "swiglu"
[[layers]]
mixer = "b"
[[layers]]
mixer = { use = "a", windo = 2 }
"""
    code, lines = check(path, text)
    numbers = [int(line.removeprefix(f"compose: {path}:").partition(":")[0]) for line in lines]
    assert code == 2
    assert numbers == [1, 3, 5, 6, 7, 9, 10, 13, 14, 15, 18, 20]
    assert lines[7].endswith("mixer.a.num_kv_heads = 3.0: must be an integer >= 1 (heads)")


def test_impossible_combinations_are_told_beside_wrong_layers(path: Path) -> None:
    text = """[model]
vocab_size = 8
hidden_size = 30
max_position_embeddings = 8
[norm]
kind = "rmsnorm"
[position]
kind = "rope"
[mixer]
kind = "gqa"
num_heads = 4
num_kv_heads = 3
[ffn]
kind = "swiglu"
intermediate_size = 8
[[layers]]
[[layers]]
ffn = "dens"
"""
    _, lines = check(path, text)
    assert [line.removeprefix(f"compose: {path}:").partition(":")[0] for line in lines] == ["11", "12", "18"]


def test_the_same_problem_at_61_layers_is_told_once() -> None:
    with pytest.raises(SpecError) as caught:
        Spec.load("llama-3.1-8b", ["layers.0.repeat=61", "mixer.attention.num_kv_heads=5"])
    (line,) = caught.value.lines
    assert line == "--set: mixer.attention.num_kv_heads = 5: must divide num_heads (32)"


def test_a_problem_of_a_component_is_told_once_however_often_it_is_refined() -> None:
    bad = {"kind": "gqa", "num_heads": 0, "colour": 1}
    layers = [{"mixer": {"use": "a", "window": window}} for window in (1, 2, 3)]
    base = Spec.load("tiny-llama").to_dict() | {"mixer": {"a": bad}, "layers": layers}
    with pytest.raises(SpecError) as caught:
        Spec.from_dict(base)
    assert [problem.field for problem in caught.value.problems] == ["mixer.a.colour", "mixer.a.num_heads"]


def test_problems_name_the_file_and_line_that_stated_the_value(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(TEXTS["tiny-llama"].replace("num_heads = 4", "num_heads = 0"))
    child = tmp_path / "child.toml"
    child.write_text(
        'extends = "base.toml"\n[[layers]]\nrepeat = 2\nmixer = { use = "attention", window = 0 }\n'
    )
    code, lines = check(child, child.read_text())
    number = TEXTS["tiny-llama"].splitlines().index("num_heads = 4") + 1
    assert code == 2
    assert lines[0] == f"compose: {child}:4: layers.0.mixer.window = 0: must be >= 1"
    assert lines[1].startswith(f"compose: {tmp_path / 'base.toml'}:{number}: mixer.attention.num_heads = 0")


def test_a_refinement_that_becomes_impossible_is_told_at_the_value(path: Path) -> None:
    text = TEXTS["tiny-llama"].replace('mixer = "attention"', 'mixer = { use = "attention", num_heads = 3 }')
    _, (line,) = check(path, text)
    number = next(n for n, told in enumerate(text.splitlines(), 1) if told.startswith("num_kv_heads"))
    assert line == f"compose: {path}:{number}: mixer.attention.num_kv_heads = 2: must divide num_heads (3)"


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"x" * 2_000_000, b"a = [" * 5000, b"= 3", b"extends = 'no'", b""]
)
def test_what_is_no_spec_is_one_line_and_exit_2(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    errors = io.StringIO()
    with redirect_stderr(errors):
        assert command.main([str(path)], standalone_mode=False) == 2
    lines = errors.getvalue().splitlines()
    assert (len(lines) == 1) == (text != b"")
    assert all(str(path) in line for line in lines)


def test_no_terminal_obeys_what_a_spec_says(path: Path) -> None:
    text = (
        TEXTS["tiny-llama"]
        .replace('kind = "rope"', 'kind = "ro\\u001b[31mpe"')
        .replace("eps", '"e\\u001bps\\n"')
    )
    code, lines = check(path, text)
    assert code == 2
    assert lines
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("mark", ["norm.rms.esp", "norm.rms", "nothing"])
def test_a_mark_on_no_value_is_refused(path: Path, mark: str) -> None:
    text = TEXTS["tiny-llama"].replace("\n[model]", f'unverified = ["{mark}", "norm.rms.eps"]\n\n[model]', 1)
    _, (line,) = check(path, text)
    assert f'unverified = "{mark}": must be the path of a value that this spec states' in line
    assert ("did you mean 'norm.rms.eps'?" in line) == mark.startswith("norm")


def test_whoever_overrides_a_value_takes_its_mark_away() -> None:
    base = Spec.load("llama-3.1-8b")
    marks = set(base.unverified)
    assert set(Spec.load(base, ["norm.rms.eps=1e-6"]).unverified) == marks - {"norm.rms.eps"}
    other = base.with_(position={"rope": {"kind": "rope", "theta": 5e5}})
    assert other.unverified == ("norm.rms.eps",)
    child = {
        "extends": "llama-3.1-8b",
        "norm": {"rms": {"eps": 1e-5}},
        "position": {"rope": {"kind": "none"}},
    }
    assert Spec.from_dict(child).unverified == ()


def test_the_command_exits_2_and_names_every_problem(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text(TEXTS["tiny-llama"].replace("num_heads = 4", 'num_heads = "4"').replace("eps =", "esp ="))
    monkeypatch.setattr(sys, "argv", ["compose", "check", str(path)])
    with pytest.raises(SystemExit) as caught:
        main()
    told: Any = capsys.readouterr()
    assert caught.value.code == 2
    assert told.out == ""
    assert [line for line in told.err.splitlines() if ":" in line][-1] == f"compose: {path}: 2 problems"
