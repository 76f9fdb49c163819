"""What `compose cost` tells: every number has a unit and a definition, in every form the same."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composeformer.costs import hardware
from composeformer.costs.breakdown import alike
from composeformer.costs.printing import document, markdown, money, shown
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
            assert quantity.definition, told


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
    for role, number in report.roles.items():
        assert f"| {role} | {number:,} |" in text
    for year in report.pricing.trend():
        assert f"| {year.year} | {money(year.hardware)} |" in text


@pytest.mark.parametrize("name", ["deepseek-v3", "smollm2-135m", "tiny-deepseek-v3", "tiny-llama"])
def test_roles_and_layers_sum_to_the_total(name: str) -> None:
    found = Report(Spec.load(name))
    counts = found.counts
    assert sum(found.roles.values()) == counts.total + counts.predictor
    ends = sum(n for role, n in found.roles.items() if not role.startswith(("layers.", "predictor.")))
    assert sum(found.layers) + ends == counts.total
    parameters = document(found)["parameters"]
    assert (parameters["by_role"], parameters["by_layer"]) == (found.roles, found.layers)


def test_layers_that_are_alike_are_told_together(report: Report) -> None:
    dense = 3 * 7168 * 18432
    attention = sum(n for role, n in report.roles.items() if role.startswith("layers.*.mixer")) // 61
    assert alike(report.layers)[0] == (0, 2, attention + dense + 2 * 7168)
    assert alike(report.layers)[1][:2] == (3, 60)
    assert sum((b - a + 1) * each for a, b, each in alike(report.layers)) == sum(report.layers)


def test_every_range_says_what_it_makes_of_what_depends_on_it(report: Report) -> None:
    """People and compute of the development; devices and power of owning, that rent knows nothing of."""
    found = report.sensitivities
    assert set(found) == {name for name, each in report.assumptions.items() if each.low is not None}
    assert found["salary"].of == found["rate"].of == "development"
    assert found["gpu_price"].of == found["pue"].of == "run, owned instead"
    assert found["life"].of == found["calendar"].of == "run, owned, straight line"
    assert found["algorithmic_progress"].of == "run, a year later"
    for name, each in found.items():
        assert each.at_low != each.at_high, name
    salary = next(swing for swing in report.swings if swing.name == "salary")
    assert (found["salary"].at_low, found["salary"].at_high) == (salary.at_low, salary.at_high)


def test_owning_has_a_range_beside_renting_and_both_hold_what_was_done_again(report: Report) -> None:
    made = report.pricing.results(report.pricing.values)
    run = report.pricing.run
    assert made["run, rented"] / run.rent == pytest.approx(made["run, owned instead"] / run.owned)
    for name, value in made.items():
        assert report.ranges[name].p5 < value < report.ranges[name].p95


def test_ranges_are_of_the_seed_that_is_told(compose: Callable[..., tuple[int, str, str]]) -> None:
    found = [
        json.loads(compose("cost", "deepseek-v3", "--json", "--seed", seed)[1]) for seed in ("0", "1", "1")
    ]
    assert [each["seed"] for each in found] == [0, 1, 1]
    assert found[1] == found[2]
    assert found[0]["ranges"] != found[1]["ranges"]
    assert found[0]["sections"] == found[1]["sections"]


ODD = "<script>alert(1)</script> [bold]x|[/nope]"


def test_odd_names_break_no_form_of_a_report(
    compose: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Brackets are markup in a terminal, bars end a cell in Markdown, tags run in a page: names are only names."""
    profile = (Path(hardware.__file__).parents[1] / "hardware" / "h100.toml").read_text()
    profile = profile.replace("Llama 3.1 model card: 700 W", ODD).replace("NVIDIA H100 SXM", ODD)
    (tmp_path / "odd-hardware.toml").write_text(profile)
    spec = tmp_path / "odd.toml"
    told = json.dumps(ODD)
    priced = f"[cost]\ntokens = 1e9\nhardware = {json.dumps(str(tmp_path / 'odd-hardware.toml'))}\n"
    spec.write_text(f'extends = "tiny-llama"\nname = {told}\n{priced}')
    code, out, err = compose("cost", str(spec))
    assert (code, err) == (0, "")
    assert f"{ODD}: cost" in out
    assert json.loads(compose("cost", str(spec), "--json")[1])["name"] == ODD
    text = compose("cost", str(spec), "--markdown")[1]
    assert "<script>" not in text.replace("\\<", "")
    rows = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("| ")]
    assert all(line.endswith(" |") for line in rows)
    page = tmp_path / "page.html"
    assert compose("cost", str(spec), "--html", str(page))[0] == 0
    assert "<script>" not in page.read_text()
    assert compose("diff", str(spec), "tiny-llama")[0] == 0
    assert compose("diff", str(spec), str(spec))[0] == 0


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


def test_bytes_that_are_sent_are_told_for_a_step_and_a_token(report: Report) -> None:
    step, sent = (report.sections[title] for title in ("optimizer step", "communication of a step"))
    tokens = step["tokens"].value
    assert tokens is not None
    named = [name for name in sent if not name.endswith(", a token")]
    assert [f"communication: {name}" for name in named] == [n for n in step if n.startswith("communication")]
    for name in named:
        whole, each = sent[name].value, sent[f"{name}, a token"].value
        assert whole is not None
        assert each is not None
        assert whole == pytest.approx(each * tokens)
    assert "experts, inter links" in named


def test_the_command_prints_every_form(compose: Callable[..., tuple[int, str, str]], report: Report) -> None:
    assert compose("cost", "deepseek-v3", "--markdown")[:2] == (0, markdown(report))
    code, out, _ = compose("cost", "deepseek-v3")
    assert code == 0
    for told in ("249.8 GFLOP", "$5.58M", "38.94%", "what it depends on", "the rent of the same run"):
        assert told in out
    code, out, _ = compose("cost", "tiny-llama")
    assert "to price a run, state cost.tokens" in out
    code, out, err = compose("cost", "tiny-llama", "--json", "--markdown")
    assert (code, out) == (2, "")
    assert "choose one" in err


@pytest.mark.parametrize("command", [("cost", "tiny-llama"), ("diff", "deepseek-v3", "tiny-llama")])
def test_a_context_beyond_the_models_is_one_line(
    compose: Callable[..., tuple[int, str, str]], command: tuple[str, ...]
) -> None:
    told = "compose: context = 513: must be <= max_position_embeddings (512)\n"
    assert compose(*command, "--context", "513") == (2, "", told)
    assert compose(*command, "--context", "512")[0] == 0


def test_a_stated_context_beyond_the_models_is_told_without_a_price_too(
    compose: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = compose("cost", "tiny-llama", "--set", "cost.context=513")
    assert (code, out) == (2, "")
    assert err == "compose: cost.context = 513: must be <= max_position_embeddings (512)\n"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("cost.tokens=1e300", "cost.tokens = 1e+300: must be between"),
        ("parallel.pipeline=61", "parallel.pipeline = 61: must be even under the schedule dualpipe"),
        ("cost.hardware=h101", "hardware h101: must be a path or one of"),
        ("cost.gpus=0", "cost.gpus = 0: must be >= 1"),
        ("cost.tokens=-5", "cost.tokens = -5: must be > 0"),
        ("cost.utilisation=1.5", "cost.utilisation = 1.5: must be <= 1"),
        ("cost.context=10000000", "cost.context = 10000000: must be <= max_position_embeddings"),
    ],
)
def test_what_can_not_be_priced_is_one_line(
    compose: Callable[..., tuple[int, str, str]], setting: str, told: str
) -> None:
    code, out, err = compose("cost", "deepseek-v3", "--set", setting)
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


def test_every_key_of_the_document_is_documented(report: Report) -> None:
    text = (Path(__file__).parents[3] / "docs" / "costs.md").read_text(encoding="utf-8")
    keys = text.partition("## A document")[2].partition("\n## ")[0]
    made = document(report)
    nested = [*made["parameters"], *made["flops_per_token"], *made["checkpoint"], *made["trend"][0]]
    for key in (*made, *nested, *made["sections"]["run"]["rent"], *made["assumptions"]["rate"]):
        if key != "year":
            assert f"`{key}`" in keys, key


def test_doctor_lists_the_devices_that_a_price_can_be_of(
    compose: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = compose("doctor", "--json")
    told = {row["what"]: row for row in json.loads(out)["checks"] if row["what"].startswith("profile ")}
    assert code == 0
    assert set(told) == {f"profile {name}" for name in hardware.shipped()}
    for name in hardware.shipped():
        figures = hardware.load(name).figures().values()
        unread = sum(not figure.read for figure in figures)
        assert told[f"profile {name}"]["detail"].endswith(f"; {unread} of {len(figures)} numbers unconfirmed")


def test_what_a_device_holds_is_told_as_a_share_of_what_it_has() -> None:
    """V3 by this layout keeps its activations in bfloat16, and 80 GB do not hold them; a small one fits."""
    section = Report(Spec.load("deepseek-v3")).sections["memory of a device"]
    share, total = section["share of the device"], section["all"].value
    assert total is not None
    assert share.value == total / 80e9
    assert share.value > 1
    assert "80 GB of the device: it does not fit" in share.definition
    small = Spec.load("tiny-deepseek-v3").with_({"cost": {"tokens": 1e9}})
    fits = Report(small).sections["memory of a device"]["share of the device"]
    assert fits.value is not None
    assert 0 < fits.value < 1
    assert "does not fit" not in fits.definition
    assert "share of the device" not in Report(Spec.load("tiny-deepseek-v3")).sections["memory of a device"]
