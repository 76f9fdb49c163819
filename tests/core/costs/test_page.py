"""The page of a report: whole, loads nothing, and says every number; its plots are drawn to scale."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composeformer.costs.difference import Difference
from composeformer.costs.difference_page import difference_page
from composeformer.costs.page import page
from composeformer.costs.plots import LEFT, RIGHT, WIDTH, Bar, Line, bars, lines
from composeformer.costs.printing import SAME, pair_row, shown
from composeformer.costs.report import Report
from composeformer.spec import Spec
from composeformer.spec.inherit import shipped


class Checker(HTMLParser):
    """Follows what is open, and keeps the text and every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("name", shipped())
def test_a_page_is_whole_says_every_number_and_loads_nothing(name: str) -> None:
    report = Report(Spec.load(name))
    text = page(report)
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    said = set(checker.text)
    for section in report.sections.values():
        for told, quantity in section.items():
            assert told in said
            assert shown(quantity) in said
    assert not {name for name, _ in checker.attributes} & {"src", "href", "onload", "onclick"}
    assert "<script" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize("names", [("deepseek-v3", "llama-3.1-405b"), ("tiny-moe", "tiny-llama")])
def test_a_page_of_two_specs_says_every_number_of_both(names: tuple[str, str]) -> None:
    found = Difference(*map(Spec.load, names))
    text = difference_page(found)
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    said = set(checker.text)
    assert {each for pair in found.pairs for each in pair_row(pair) if each} <= said
    assert {each.where for each in found.changes} | {f"{each.value:.3f}" for each in found.factors} <= said
    assert not {name for name, _ in checker.attributes} & {"src", "href", "onload", "onclick"}
    assert "<script" not in text
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(drawn) == 1 + bool(found.factors)
    assert all(svg.findall("rect") for svg in drawn)


def test_a_page_of_a_spec_and_itself_says_that_they_are_the_same() -> None:
    spec = Spec.load("tiny-llama")
    assert SAME in difference_page(Difference(spec, spec))


def test_names_that_are_markup_are_text() -> None:
    report = Report(Spec.load("tiny-llama").with_({"name": "<b>&x"}))
    assert "<b>&x" not in page(report)
    assert "&lt;b&gt;&amp;x" in page(report)
    compared = difference_page(Difference(report.spec, Spec.load("tiny-moe")))
    assert "<b>&x" not in compared
    assert "&lt;b&gt;&amp;x" in compared


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=6))
def test_bars_are_as_long_as_their_values(values: list[float]) -> None:
    drawn = ElementTree.fromstring(bars([Bar(name="a", low=0, high=v, told="") for v in values]))
    widths = [float(box.attrib["width"]) for box in drawn.iter("rect")]
    room = WIDTH - LEFT - RIGHT
    for width, value in zip(widths, values, strict=True):
        # A bar is a pixel wide at least, and places have one decimal.
        assert width == pytest.approx(max(1.0, room * value / max(values)), abs=0.11)


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(1, 1e6)), min_size=1, max_size=5), st.booleans())
def test_lines_stay_within_the_picture(points: list[tuple[float, float]], log: bool) -> None:
    points = sorted(points)
    drawn = lines(
        [Line(name="a", points=points, band=[(x, y / 2, y * 2) for x, y in points])],
        x_label="x", y_label="y", log_x=log, log_y=log, level=(5.0, "five"),
    )  # fmt: skip
    for line in ElementTree.fromstring(drawn).iter():
        for pair in line.attrib.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= 320


def test_the_command_writes_the_page(compose: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    file = tmp_path / "cost.html"
    assert compose("cost", "tiny-llama", "--html", str(file)) == (0, f"wrote {file}\n", "")
    assert file.read_text(encoding="utf-8") == page(Report(Spec.load("tiny-llama")))
    both = ("diff", "tiny-llama", "tiny-moe")
    assert compose(*both, "--html", str(file)) == (0, f"wrote {file}\n", "")
    compared = Difference(*map(Spec.load, both[1:]))
    assert file.read_text(encoding="utf-8") == difference_page(compared)
    code, _, err = compose("cost", "tiny-llama", "--html", str(tmp_path / "no" / "cost.html"))
    assert (code, err.count("\n")) == (2, 1)


def test_bars_from_nothing_are_on_a_plain_scale_and_none_are_no_error() -> None:
    """A logarithm has no place for zero."""
    rows = [
        Bar(name="none", low=0.0, high=0.0, told="$0"),
        Bar(name="some", low=1.0, high=4.0, told="$4", mark=2.0),
    ]
    drawn = ElementTree.fromstring(bars(rows, log=True))
    widths = [float(each.attrib["width"]) for each in drawn if each.tag == "rect"]
    assert widths == [1.0, pytest.approx(0.75 * (WIDTH - LEFT - RIGHT), abs=0.1)]
    ElementTree.fromstring(bars([], log=True))


def test_a_page_of_a_run_without_people_is_drawn() -> None:
    assert "$0.00" in page(Report(Spec.load("deepseek-v3", ["cost.headcount=0"])))


@given(st.lists(st.text("mw", min_size=1, max_size=40), min_size=1, max_size=4))
def test_bars_have_room_for_their_names(names: list[str]) -> None:
    """A letter of wide fonts takes seven units; the longest name ends where its bar begins."""
    tree = ElementTree.fromstring(bars([Bar(name=name, low=0.0, high=1.0, told="") for name in names]))
    written = {each.text: float(each.attrib["x"]) for each in tree.iter("text") if each.text}
    assert written.keys() == set(names)
    for name, end in written.items():
        assert end >= 7.2 * len(name)
