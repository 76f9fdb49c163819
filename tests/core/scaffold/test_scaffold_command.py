"""`compose plugins new` writes a whole package or nothing, and says in one line what it refuses."""

import json
import keyword
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from composeformer.discovery import canonical
from composeformer.errors import FolderError, InputError
from composeformer.hookspecs import API_RANGE
from composeformer.scaffold import STARTS, create, named
from composeformer.scaffold.writing import rendered

from .conftest import Site

WHOLE = {
    ".gitignore",
    "README.md",
    "example.toml",
    "my_mixer/__init__.py",
    "my_mixer/module.py",
    "my_mixer/plugin.py",
    "pyproject.toml",
    "tests/test_laws.py",
}
# A process whose files may not grow beyond this many bytes: writing fails in the midst, as on a full disk.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.argv = ["compose", "plugins", "new", "my-mixer", "--slot", "mixer", "-o", sys.argv[1]]
from composeformer.cli import main
main()
"""


def compose(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "composeformer", "plugins", "new", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_json_says_what_was_written(tmp_path: Path) -> None:
    done = compose(tmp_path, "My.Mixer", "--slot", "mixer", "--kind", "mean", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert set(told.pop("files")) == WHOLE == files(tmp_path / "my-mixer")
    assert told.pop("code_lines") <= 80
    assert told == {
        "name": "my-mixer",
        "package": "my_mixer",
        "slot": "mixer",
        "kind": "mean",
        "folder": "my-mixer",
    }
    project = tomli.loads((tmp_path / "my-mixer" / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [f"composeformer{API_RANGE}"]
    assert project["entry-points"] == {"composeformer": {"my_mixer": "my_mixer.plugin"}}
    laws = (tmp_path / "my-mixer" / "tests" / "test_laws.py").read_text().splitlines()
    assert laws[-1] == 'test_laws = laws_of("my-mixer")'


def test_words_for_people_name_the_next_steps(tmp_path: Path) -> None:
    done = compose(tmp_path, "my-mixer", "--slot", "mixer", "-o", "here/new")
    assert (done.returncode, done.stderr) == (0, "")
    steps = [line.strip() for line in done.stdout.splitlines()[1:]]
    assert steps == [
        "pip install -e here/new",
        "compose build here/new/example.toml",
        "compose plugins check my-mixer",
    ]
    assert files(tmp_path) == {f"here/new/{name}" for name in WHOLE}


def test_the_next_steps_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    done = compose(tmp_path, "my-mixer", "--slot", "mixer", "-o", "a folder/$new")
    steps = [shlex.split(line) for line in done.stdout.splitlines()[1:]]
    assert steps[0][-1] == "a folder/$new"
    assert (tmp_path / steps[1][-1]).is_file()


def test_a_folder_with_anything_in_it_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "my-mixer").mkdir()
    (tmp_path / "my-mixer" / "notes").write_text("mine")
    done = compose(tmp_path, "my-mixer", "--slot", "mixer")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("my-mixer: the folder exists and is not empty; nothing was written\n")
    assert files(tmp_path) == {"my-mixer/notes"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    create("my-mixer", "mixer", tmp_path / "place")
    assert files(tmp_path / "place") == WHOLE


def test_a_file_in_its_place_stays(tmp_path: Path) -> None:
    (tmp_path / "my-mixer").write_text("mine")
    for target in (tmp_path / "my-mixer", tmp_path / "my-mixer" / "below"):
        with pytest.raises(FolderError):
            create("my-mixer", "mixer", target)
    assert files(tmp_path) == {"my-mixer"}


def test_what_fails_in_the_midst_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "deep" / "below" / "new")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "can not be written: File too large" in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("x", "--slot", "moxer"), 'slot = "moxer": is no slot; allowed: '),
        (("x", "--slot", "schedule"), 'slot = "schedule": nothing reads components of this slot; allowed: '),
        (("class", "--slot", "ffn"), "Python has a keyword of that name"),
        (("json", "--slot", "ffn"), "would hide the module of Python's standard library"),
        (("torch", "--slot", "ffn"), 'name = "torch": is installed: torch '),
        (("Composeformer_MoE", "--slot", "ffn"), "its package 'composeformer_moe' is installed: "),
        (
            ("Attention_MLA", "--slot", "ffn"),
            "is the name of an installed plugin: attention_mla (composeformer ",
        ),
        (("1st", "--slot", "ffn"), "a module's name begins with a letter"),
        (("my/ffn", "--slot", "ffn"), "must be letters and digits of ASCII"),
        (("x" * 41, "--slot", "ffn"), "must have at most 40 characters"),
        (
            ("new", "--slot", "mixer", "--kind", "gqa"),
            'kind = "gqa": is a mixer of plugin dense (composeformer ',
        ),
        (
            ("new", "--slot", "codec", "--kind", "int8"),
            'kind = "int8": is a precision of plugin fp8 (composeformer ',
        ),
        (("new", "--slot", "mixer", "--kind", "a b"), "a kind is made of letters, digits, '-', '_' and '.'"),
    ],
)
def test_names_that_can_not_be_are_refused_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    name, _, slot, *kind = arguments
    with pytest.raises(InputError) as caught:
        create(name, slot, tmp_path / "new", *kind[1:])
    assert len(caught.value.lines) == 1
    assert told in caught.value.lines[0]
    assert os.listdir(tmp_path) == []


def test_a_refusal_ends_the_command_with_status_2(tmp_path: Path) -> None:
    done = compose(tmp_path, "new", "--slot", "mixer", "--kind", "mla", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    owner = "is a mixer of plugin attention_mla (composeformer 0.1.0); choose another by --kind"
    assert done.stderr == f'compose: kind = "mla": {owner}\n'
    assert os.listdir(tmp_path) == []


@given(
    st.from_regex(r"[A-Za-z0-9._-]{1,12}", fullmatch=True) | st.text(max_size=6),
    st.sampled_from(sorted(STARTS)),
)
def test_every_name_that_is_taken_makes_modules_of_python(name: str, slot: str) -> None:
    try:
        names = named(name, slot)
    except InputError:
        return  # which says why: see above
    assert names.distribution == canonical(name)
    assert names.package.isidentifier()
    assert not keyword.iskeyword(names.package)
    assert names.package not in sys.stdlib_module_names
    for place, text in rendered(names, slot).items():
        if place.endswith(".py"):
            compile(text, place, "exec")
        if place.endswith(".toml"):
            tomli.loads(text)


def test_a_plugin_is_told_of_by_its_distribution_as_well(written: Site) -> None:
    for name in ("my_ffn", "My.FFN", "my-ffn:my_ffn"):
        done = written.run("-m", "composeformer", "plugins", "info", name, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["name"] == "my_ffn"
    done = written.run("-m", "composeformer", "plugins", "info", "my-ffn")
    assert "ffn my-ffn: two maps around a squared relu [reference]" in done.stdout
    done = written.run("-m", "composeformer", "plugins", "info", "composeformer")
    assert done.returncode == 2
    assert done.stderr.startswith("compose: composeformer: has several plugins: composeformer:attention_mla, ")
    done = written.run("-m", "composeformer", "plugins", "info", "my-fn")
    assert done.stderr.endswith("did you mean 'my-ffn'?\n")
