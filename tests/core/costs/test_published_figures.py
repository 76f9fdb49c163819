"""What was published of DeepSeek-V3's cost follows from the tool, each figure within its tolerance."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
MADE = runpy.run_path(str(ROOT / "docs" / "make_deepseek_v3_cost.py"))
ROWS: list[Any] = list(MADE["rows"]())
FACTS = json.loads((ROOT / "tests" / "data" / "published_figures.json").read_text(encoding="utf-8"))["facts"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.id}-{row.what}")
def test_a_published_figure_is_reproduced(row: Any) -> None:
    assert row.reproduced, f"{row.what}: {row.published} against {row.computed} ({row.deviation:+.3g})"


def test_every_fact_is_reproduced_or_an_input() -> None:
    reproduced = {row.id for row in ROWS}
    assert {fact["id"] for fact in FACTS} == (reproduced | set(MADE["INPUTS"])) & {
        fact["id"] for fact in FACTS
    }
    # What is read enters as it is; what has a number and a tolerance to be held to is computed.
    for fact in FACTS:
        if fact["id"] not in reproduced:
            assert fact["tolerance"] in ("-", "exact"), fact["id"]


@pytest.mark.parametrize(
    "fact", [f for f in FACTS if "%" in f["tolerance"] or "pp" in f["tolerance"]], ids=lambda f: f["id"]
)
def test_a_figure_is_held_to_the_tolerance_that_is_stated(fact: dict[str, Any]) -> None:
    stated = re.match(r"([\d.]+) ?(%|pp)", fact["tolerance"])
    assert stated is not None
    allowed = float(stated[1]) / 100
    own = [row for row in ROWS if row.id == fact["id"]]
    assert own
    assert all(row.tolerance <= allowed * 1.0000001 for row in own)


def test_dense_rows_of_the_paper_are_shown_as_not_matching() -> None:
    for _, published, name in MADE["NOT_TO_BE_MATCHED"]:
        computed = MADE["counts"](name).flops_per_token.training / 1e9
        assert abs(computed / published - 1) > 0.009
    text = MADE["page"]()
    assert "+12.9%" in text
    assert "Not matched, and not to be" in text


def test_the_page_agrees_with_the_tool() -> None:
    page = (ROOT / "docs" / "deepseek-v3-cost.md").read_text(encoding="utf-8")
    assert page == MADE["page"](), "run: python docs/make_deepseek_v3_cost.py"


def test_the_page_with_plots_is_what_the_command_writes() -> None:
    text = (ROOT / "docs" / "deepseek-v3-cost.html").read_text(encoding="utf-8")
    assert text == MADE["picture"](), "run: python docs/make_deepseek_v3_cost.py"
