"""`compose plugins check` and the one line of a plugin's own suite, on a plugin that is installed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from composeformer.cli import main
from composeformer.plugins import configure

PLUGIN = """
import average_plugin as averages
from composeformer.hookspecs import hookimpl

@hookimpl
def compose_components():
    yield averages.component("average", averages.Average)
    yield averages.component("peeking", averages.Peeking)
"""
SUITE = """
from composeformer.testing import laws_of

test_laws = laws_of("averages")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averages")
    (folder / "averages_of_a_user.py").write_text(PLUGIN)
    info = folder / "averages_dist-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: averages-dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[composeformer]\naverages = averages_of_a_user\n")
    (folder / "test_laws.py").write_text(SUITE)
    return folder


@pytest.fixture
def compose(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Any]:
    """Runs `compose ARGS` in this process: (exit code, stdout, stderr)."""
    monkeypatch.syspath_prepend(str(installed))
    configure()

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compose", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    yield run
    monkeypatch.undo()
    configure()


def test_a_certificate_names_every_law_and_what_broke(compose: Any) -> None:
    code, out, _ = compose("plugins", "check", "averages", "--law", "mixer.causal", "--examples", "20")
    assert code == 1
    assert "mixer average" in out
    assert "mixer peeking" in out
    assert "held" in out
    assert "averages: 1 law broken" in out
    assert "from composeformer.testing import replay" in out
    assert "def test_mixer_causal_peeking():" in out


def test_a_certificate_as_json_is_one_document(compose: Any) -> None:
    code, out, _ = compose("plugins", "check", "averages-dist", "--law", "mixer.causal", "--json", "--seed", "4")
    found = json.loads(out)
    assert code == 1
    assert found["held"] is False
    by_kind = {each["kind"]: each for each in found["findings"]}
    right, wrong = by_kind["average"], by_kind["peeking"]
    assert (right["verdict"], right["counterexample"], right["seed"]) == ("held", None, 4)
    assert right["error"] <= right["bound"]
    assert wrong["verdict"] == "broken"
    assert wrong["values"]["tokens"] == 2
    assert "replay(" in wrong["counterexample"]


def test_a_report_leaves_no_folder_where_it_was_asked(
    compose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose("plugins", "check", "averages", "--law", "mixer.causal", "--examples", "2")[0] == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_right_exits_with_zero(compose: Any) -> None:
    code, out, _ = compose("plugins", "check", "mtp", "--law", "mixer.causal")
    assert code == 2, "no law of mixers is for a predictor"
    code, out, _ = compose("plugins", "check", "attention_mla", "--law", "mixer.causal", "--examples", "3")
    assert code == 0
    assert "attention_mla: all laws hold, in 9 cases" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("avrages",), "avrages: no plugin has this name"),
        (("averages", "--law", "mixer.casual"), "mixer.casual: no such law; did you mean 'mixer.causal'"),
        (("averages", "--slot", "norm"), "averages: no law was tried; its components are of mixer"),
    ],
)
def test_what_can_not_be_tried_is_one_line(compose: Any, arguments: tuple[str, ...], told: str) -> None:
    code, out, err = compose("plugins", "check", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_one_line_of_a_plugins_own_suite_tries_all_laws(installed: Path) -> None:
    path = os.pathsep.join([str(installed), str(Path(__file__).parent), *filter(None, sys.path)])
    chosen = "mixer.causal-average or mixer.causal-peeking"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(installed)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "mixer.causal: mixer peeking (reference): outputs before the changed token" in done.stdout
    assert "from composeformer.testing import replay" in done.stdout


def test_a_law_may_take_any_time_that_is_a_number(compose: Any) -> None:
    tried = ("plugins", "check", "averages", "--law", "mixer.causal", "--examples", "1", "--timeout")
    code, _, err = compose(*tried, "nan")
    assert code == 2
    assert "Invalid value for '--timeout': nan is not in the range" in err
    for told in ("inf", "1e300"):
        code, out, _ = compose(*tried, told)
        assert code in (0, 1)
        assert "mixer average" in out
