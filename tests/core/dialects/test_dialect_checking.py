"""A name of ours that nothing has is found in a dialect file before anybody has a model of its family."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import tomli
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.dialects import codings
from composeformer.dialects.checking import check
from composeformer.plugins import current
from composeformer.testing import laws_of
from composeformer.testing.foreign import dialect_findings

test_laws_of_dialects = laws_of(slot="dialect")

TEXTS = {file.name: file.read_text(encoding="utf-8") for file in current().dialect_files}
FAMILIES = {name: tomli.loads(text) for name, text in TEXTS.items() if not codings.is_coding(text)}
# Those of which the class defaults make a model.
WHOLE = [name for name, text in TEXTS.items() if name in FAMILIES and not check(text, name).untried]


def test_a_plugins_dialects_are_among_what_is_found_of_it() -> None:
    for info in current().infos:
        found = {finding.kind: finding for finding in dialect_findings(info.name)}
        assert list(found) == [file.name for file in info.dialects]
        assert all(finding.held and finding.cases == 1 for finding in found.values())


def test_most_families_are_tried_with_a_model() -> None:
    assert len(WHOLE) > len(FAMILIES) / 2
    for name in FAMILIES.keys() - set(WHOLE):
        assert check(TEXTS[name], name).untried.startswith("tensors, for ")


def paths(key: dict[str, Any]) -> list[str]:
    """The paths that a line of `config` fills, below a slot or the model."""
    stated = key.get("ours", [])
    return [path for path in ([stated] if isinstance(stated, str) else stated) if "." in path]


def beside(path: str) -> str:
    """A name in the same place that nothing has."""
    return f"{path.rpartition('.')[0]}.unheard_of"


def unconditional(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines that move one tensor of each layer, or of an end, in every model."""
    lines: list[dict[str, Any]] = document["tensors"]
    return [
        line for line in lines if isinstance(line.get("ours"), str) and not line.keys() & {"when", "each"}
    ]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_field_that_no_part_has_is_told_with_its_line(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FAMILIES)))
    document = copy.deepcopy(FAMILIES[name])
    theirs = data.draw(st.sampled_from(sorted(k for k, key in document["config"].items() if paths(key))))
    key = document["config"][theirs]
    stated = paths(key)
    # Expressions of other lines go on calling it as they did.
    key.setdefault("name", stated[0].rpartition(".")[2])
    key["ours"] = [*stated[:-1], beside(stated[-1])]
    (slip,) = [line for line in check(tomli_w.dumps(document), name).slips if "unheard_of" in line]
    assert slip.startswith(f'{name}: config.{theirs}: "{key["ours"][-1]}" leads nowhere: ')
    assert "has no field 'unheard_of'; it has: " in slip


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_tensor_that_no_model_has_is_told_with_its_line(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(WHOLE))
    document = copy.deepcopy(FAMILIES[name])
    line = data.draw(st.sampled_from(unconditional(document)))
    line["ours"] = beside(line["ours"])
    slips = check(tomli_w.dumps(document), name).slips
    assert any(slip.startswith(f"{name}: {line['theirs']}: this model has no tensor ") for slip in slips)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_tensor_that_no_line_moves_is_told(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(WHOLE))
    document = copy.deepcopy(FAMILIES[name])
    gone = data.draw(st.sampled_from(unconditional(document)))
    document["tensors"].remove(gone)
    ours = gone["ours"].replace("{l}", "0")
    slips = check(tomli_w.dumps(document), name).slips
    assert any(
        slip.startswith(f"{name}: {ours}: ") and slip.endswith(" has no tensor for it") for slip in slips
    )


LLAMA = "llama.toml"
WRONG: list[tuple[tuple[str, ...], Any, str]] = [
    (("ours", "mixer.kind"), "gqaa", 'mixer.kind = "gqaa": unknown mixer kind; allowed: '),
    (("ours", "residual.norm.kind"), "rope", 'residual.norm.kind = "rope": unknown norm kind; allowed: '),
    (("ours", "mixer.num_heads.kind"), "gqa", "mixer.num_heads holds no part"),
    (("config", "rope_parameters.rope_type", "values"), {"default": "ropy"}, '"ropy": unknown position kind'),
    (("format",), 2, "format must be 1"),
]


@pytest.mark.parametrize(("steps", "value", "words"), WRONG)
def test_whatever_else_is_wrong_is_told_in_one_line_that_names_the_file(
    steps: tuple[str, ...], value: Any, words: str
) -> None:
    document = copy.deepcopy(FAMILIES[LLAMA])
    table = document
    for step in steps[:-1]:
        table = table[step]
    table[steps[-1]] = value
    checked = check(tomli_w.dumps(document), LLAMA)
    assert all(slip.startswith(LLAMA) and "\n" not in slip for slip in checked.slips)
    assert any(words in slip for slip in checked.slips)


CODING: dict[str, Any] = {
    "format": 1,
    "name": "rows",
    "quant_method": "row-integers",
    "codec": "int8-row",
    "companions": [{"theirs": "{module}.scales"}],
    "precision": {"kind": "int8"},
    "config": {"bits": {"require": 8}},
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"codec": "int9-row"}, 'codec = "int9-row": unknown codec kind; allowed: int8-row'),
        ({"precision": {"kind": "int9"}}, 'precision = "int9": unknown precision kind; allowed: full'),
        ({"companions": []}, "names 0 tensors beside the codes, the codec int8-row stores 1"),
        ({"precision": {"kind": "int8", "group": 3}}, "precision.group leads nowhere: it has: rules"),
        ({"config": {"bits": {"ours": "precision.bits"}}}, "precision.bits leads nowhere: it has: rules"),
    ],
)
def test_a_coding_is_held_to_its_codec_and_its_policy(changes: dict[str, Any], words: str) -> None:
    # A file whose first key is `codec` is a coding.
    slips = check(tomli_w.dumps({**CODING, **changes}), "rows.toml").slips
    assert len(slips) == bool(words)
    assert all(slip.startswith("rows.toml: ") and words in slip for slip in slips)


def test_checking_needs_no_torch() -> None:
    code = """
import sys
from composeformer.dialects.checking import check
from composeformer.plugins import current
for file in current().dialect_files:
    check(file.read_text(), file.name)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
