"""A predictor that can not be is refused in one line, where it is written, before anything is made."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.resources import files
from pathlib import Path

import attrs
import pytest

from composeformer.cli.check_command import command
from composeformer.errors import SpecError
from composeformer.plugins import current
from composeformer.registry import Registry
from composeformer.spec import Spec
from composeformer.spec.document import from_data

TEXT = (files("composeformer") / "specs" / "tiny-deepseek-v3.toml").read_text("utf-8")
START = TEXT.index("[predictor]")
LINE = TEXT[:START].count("\n") + 1  # of [predictor]


def checked(path: Path, text: str) -> list[str]:
    """What `compose check` says on stderr, the same as reading the text; asserts that it is refused."""
    path.write_text(text, "utf-8")
    with pytest.raises(SpecError) as caught:
        Spec.from_toml(text, label=str(path))
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()):
        assert command.main([str(path)], standalone_mode=False) == 2
    lines = errors.getvalue().splitlines()
    assert lines[: len(caught.value.lines)] == [f"compose: {line}" for line in caught.value.lines]
    return list(caught.value.lines)


WRONG = [
    ("depth = 0", "predictor.depth = 0: must be >= 1"),
    ("depth = 17", "predictor.depth = 17: must be <= 16"),
    ("depth = 1000000000", "predictor.depth = 1000000000: must be <= 16"),
    ("depth = true", "predictor.depth = true: must be an integer >= 1 <= 16 (tokens)"),
    ("loss_weight = -1", "predictor.loss_weight = -1: must be >= 0"),
    ("dept = 1", "did you mean 'depth'?"),
    ('norm = "rmss"', "predictor.norm = \"rmss\": no norm has this name; allowed: rms; did you mean 'rms'?"),
    ("layer = 3", "predictor.layer = 3: must be a table with mixer and ffn"),
    ('layer = "experts"', 'predictor.layer = "experts": must be a table with mixer and ffn'),
    ('layer = ["mla"]', "predictor.layer: must be a table with mixer and ffn"),
    (
        "layer = {}",
        "predictor.layer.ffn: is required: this spec names several ffn components: dense, experts",
    ),
    ("layer = { mixer = false, ffn = false }", "predictor.layer: a layer needs a mixer or an ffn"),
    (
        "layer = { mixer = true, ffn = 'dense' }",
        "predictor.layer.mixer = true: must be the name of a mixer, a table",
    ),
    ('layer = { mixr = "mla", ffn = "dense" }', "unknown key; allowed: mixer, ffn; did you mean 'mixer'?"),
    ('layer = { ffn = "dense", repeat = 2 }', "predictor.layer.repeat = 2: unknown key; allowed: mixer, ffn"),
    ('layer = { ffn = "dens" }', "allowed: dense, experts; did you mean 'dense'?"),
    (
        'layer = { ffn = "mla" }',
        "predictor.layer.ffn = \"mla\": no ffn has this name; allowed: dense, experts ('mla' is",
    ),
    ('layer = { ffn = { use = "dense", intermediat_size = 3 } }', "did you mean 'intermediate_size'?"),
    (
        'layer = { ffn = { use = "experts", router = { top_k = 17 } } }',
        "router.top_k = 17: must be <= num_experts (16)",
    ),
    (
        'layer = { ffn = { kind = "swiglu" } }',
        "predictor.layer.ffn.intermediate_size: is required: an integer >= 1",
    ),
    ('layer = { ffn = { kind = "swigloo", intermediate_size = 8 } }', "did you mean 'swiglu'?"),
    (
        'layer = { mixer = { use = "mla", kv_lora_rank = 0 }, ffn = "dense" }',
        "mixer.kv_lora_rank = 0: must be >= 1",
    ),
]


@pytest.mark.parametrize(("wrong", "told"), WRONG)
def test_what_is_impossible_is_refused_at_its_line(tmp_path: Path, wrong: str, told: str) -> None:
    path = tmp_path / "wrong.toml"
    (line,) = checked(path, TEXT[:START] + f'[predictor]\nkind = "mtp"\n{wrong}\n')
    # An absent key is told at the table around it, which stands on the same line.
    assert line.startswith(f"{path}:{LINE + 2}: predictor.")
    assert told in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[predictor]\nkind = "mtpp"\n', "unknown predictor kind; allowed: mtp; did you mean 'mtp'?"),
        ("[predictor]\ndepth = 1\n", "predictor: a predictor needs a kind: mtp"),
        (
            '[predictor.far]\nkind = "mtp"\n',
            "a model has one predictor, which has no name: write [predictor]",
        ),
        ('[predicter]\nkind = "mtp"\n', "did you mean 'predictor'?"),
    ],
)
def test_a_predictor_that_is_none_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (line,) = checked(tmp_path / "wrong.toml", TEXT[:START] + text)
    assert told in line


def test_a_last_layer_that_is_wrong_is_told_once(tmp_path: Path) -> None:
    """The predictor takes it over, and has nothing to add."""
    (line,) = checked(tmp_path / "wrong.toml", TEXT.replace("top_k = 4", "top_k = 17"))
    assert "ffn.experts.router.top_k = 17: must be <= num_experts (16)" in line


def test_a_depth_that_no_sequence_has_room_for_is_refused() -> None:
    data = Spec.from_toml(TEXT).to_dict()
    data["model"]["max_position_embeddings"] = 2
    assert Spec.from_dict(data).plan.predictor is not None
    data["predictor"]["depth"] = 2
    with pytest.raises(SpecError, match=r"predictor.depth = 2: must be < max_position_embeddings \(2\)$"):
        Spec.from_dict(data)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"head = false\n{TEXT}", ":1: head = false: must be a table: [head] with a kind"),
        (f"{TEXT}[head]\n", ": head: a head needs a kind: linear"),
        (f'{TEXT}[head]\nkind = "none"\n', ': head.kind = "none": unknown head kind; allowed: linear'),
    ],
)
def test_a_predictor_on_a_model_without_a_head_is_one_error(tmp_path: Path, text: str, told: str) -> None:
    (line,) = checked(tmp_path / "wrong.toml", text)
    assert told in line


def test_where_no_plugin_brings_a_head_one_line_says_so() -> None:
    infos = [
        attrs.evolve(info, components=tuple(c for c in info.components if c.slot != "head"))
        for info in current().registry.infos
    ]
    with pytest.raises(SpecError) as caught:
        Spec(from_data(Spec.from_toml(TEXT).to_dict()), Registry(infos))
    assert [line.removeprefix("python: ") for line in caught.value.lines] == [
        "head: is required: no plugin that is loaded has a default head",
    ]


def test_it_is_refused_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(TEXT.replace("depth = 1", 'layer = { ffn = "dens" }'), "utf-8")
    code = (
        "import sys; from composeformer.cli.check_command import command; "
        f"print(command.main([{str(path)!r}], standalone_mode=False), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 False"
    assert "did you mean 'dense'?" in done.stderr


def test_a_residual_that_is_wrong_is_told_as_without_a_predictor() -> None:
    data = Spec.from_toml(TEXT).to_dict()
    norm = data.pop("norm")
    one = norm if "kind" in norm else next(iter(norm.values()))
    data["norm"] = {"main": one, "local": one}
    data["predictor"]["norm"] = "main"
    with pytest.raises(
        SpecError, match=r"residual\.norm: is required: this spec names several norm components"
    ):
        Spec.from_dict(data)
