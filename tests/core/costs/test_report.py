"""What `compose cost` tells: every number has a unit and a definition, in every form the same."""

import json
import subprocess
import sys
from typing import Any

import pytest

from composeformer.cli import main
from composeformer.costs.printing import document, markdown, shown
from composeformer.costs.quantities import Quantity
from composeformer.costs.report import Report
from composeformer.spec import Spec
from composeformer.spec.inherit import shipped


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(Spec.load("deepseek-v3"))


@pytest.mark.parametrize("name", shipped())
def test_every_number_of_every_shipped_spec_says_what_it_is(name: str) -> None:
    found = Report(Spec.load(name))
    for title, section in found.sections.items():
        assert section, title
        for told, quantity in section.items():
            assert quantity.value is not None, told
            assert quantity.value >= 0, told
            assert quantity.definition or title == "folder", told


def test_unpriced_specs_have_no_money_and_priced_ones_have_three_scopes(report: Report) -> None:
    assert "run" not in Report(Spec.load("tiny-llama")).sections
    titles = list(report.sections)
    assert titles[-4:] == ["run", "utilisation", "development", "organisation-year"]


def test_a_number_of_an_unread_source_says_so(report: Report) -> None:
    assert report.pricing.hardware.power.read is False
    assert "unconfirmed" in markdown(report)
    assert document(report)["sections"]["run"]["energy"]["confirmed"] is False


def test_the_document_keeps_its_old_keys_and_has_every_section(report: Report) -> None:
    found = json.loads(json.dumps(document(report)))
    assert found["parameters"]["total"] == 671026404352
    assert found["flops_per_token"]["context"] == 4096
    assert found["sections"]["run"]["rent"]["unit"] == "USD"
    assert set(found["assumptions"]["rate"]) >= {"value", "low", "high", "source", "read", "unit", "help"}
    assert [swing["name"] for swing in found["tornado"]][:2] == ["salary", "years"]
    assert {year["year"] for year in found["trend"]} == set(range(2020, 2029))
    assert found["ranges"]["run, rented"]["p5"] < found["ranges"]["run, rented"]["p95"]


def test_markdown_has_every_number_and_assumption(report: Report) -> None:
    text = markdown(report)
    for section in report.sections.values():
        for name, quantity in section.items():
            assert f"| {name} | {shown(quantity)} |" in text
    for name in report.assumptions:
        assert f"| {name} |" in text


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (None, "FLOP", "unknown"),
        (671026404352, "parameters", "671,026,404,352"),
        (249811304448.0, "FLOP", "249.8 GFLOP"),
        (5576000.0, "USD", "$5.58M"),
        (1.5e9, "USD", "$1.50B"),
        (0.3894, "", "38.94%"),
        (70272, "bytes", "70,272 B (70.27 kB)"),
        (54.2, "days", "54.2 days"),
        (2788000, "device hours", "2,788,000 device hours"),
    ],
)
def test_a_quantity_is_written_with_its_unit(value: Any, unit: str, told: str) -> None:
    assert shown(Quantity(value=value, unit=unit, definition="it")) == told


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["compose", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_prints_every_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], report: Report
) -> None:
    assert run(monkeypatch, capsys, "cost", "deepseek-v3", "--markdown")[:2] == (0, markdown(report))
    code, out, _ = run(monkeypatch, capsys, "cost", "deepseek-v3")
    assert code == 0
    for told in ("249.8 GFLOP", "$5.58M", "38.94%", "what it depends on most"):
        assert told in out
    code, out, _ = run(monkeypatch, capsys, "cost", "tiny-llama")
    assert "to price a run, state cost.tokens" in out
    code, out, err = run(monkeypatch, capsys, "cost", "tiny-llama", "--json", "--markdown")
    assert (code, out) == (2, "")
    assert "choose one" in err


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("cost.hardware=h101", "hardware h101: must be a path or one of"),
        ("cost.gpus=0", "cost.gpus = 0: must be >= 1"),
        ("cost.tokens=-5", "cost.tokens = -5: must be > 0"),
        ("cost.utilisation=1.5", "cost.utilisation = 1.5: must be <= 1"),
        ("cost.context=10000000", "cost.context = 10000000: must be <= max_position_embeddings"),
    ],
)
def test_what_can_not_be_priced_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str, told: str
) -> None:
    code, out, err = run(monkeypatch, capsys, "cost", "deepseek-v3", "--set", setting)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from composeformer.costs.report import Report; from composeformer.spec import Spec; "
        "from composeformer.costs.printing import document; document(Report(Spec.load('deepseek-v3'))); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
