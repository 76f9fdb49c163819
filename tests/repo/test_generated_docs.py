"""Pages that are generated agree with what they are generated from."""

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_spec_reference_agrees_with_the_configs() -> None:
    made = runpy.run_path(str(DOCS / "make_spec_reference.py"))["page"]()
    assert (DOCS / "spec.md").read_text(encoding="utf-8") == made, "run: python docs/make_spec_reference.py"


def test_page_of_laws_agrees_with_the_laws() -> None:
    made = runpy.run_path(str(DOCS / "make_laws_reference.py"))["page"]()
    assert (DOCS / "laws.md").read_text(encoding="utf-8") == made, "run: python docs/make_laws_reference.py"


def test_every_file_of_the_tour_exists() -> None:
    core = DOCS.parent / "core" / "composeformer"
    names = {path.name for path in core.rglob("*")} | {p.name for p in (DOCS.parent / "plugins").rglob("*")}
    import re

    text = (DOCS / "tour.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.(?:py|toml)|[a-z]+/)`", text):
        assert Path(name).name in names, name
