"""Writing a document and reading it gives the same data."""

from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.spec.document import parse
from composeformer.spec.writer import dumps

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
KEYS = st.one_of(st.sampled_from(["format", "name", "extends", "layers", "kind", "a.b", ""]), TEXTS)
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
)
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(KEYS, below, max_size=4),
    max_leaves=20,
)


def same(one: object, other: object) -> bool:
    """Equal, and of equal types: in Python 1 == 1.0 == True."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_what_is_written_reads_back_and_is_written_alike(data: dict[str, object]) -> None:
    text = dumps(data)
    read = parse(text, "x.toml").data
    assert same(read, data)
    assert dumps(read) == text
    assert text.endswith("\n")


def test_a_spec_reads_as_one_would_write_it() -> None:
    data = {
        "ffn": {"dense": {"kind": "swiglu", "sizes": [1, 2]}},
        "layers": [{"mixer": {"use": "mla", "window": 4}, "repeat": 3}, {"mixer": "mla"}],
        "unverified": ["a"],
        "extends": "b",
        "name": "a",
        "format": 1,
    }
    assert dumps(data) == (
        'format = 1\nname = "a"\nextends = "b"\nunverified = ["a"]\n\n'
        '[ffn.dense]\nkind = "swiglu"\nsizes = [1, 2]\n\n'
        '[[layers]]\nmixer = { use = "mla", window = 4 }\nrepeat = 3\n\n'
        '[[layers]]\nmixer = "mla"\n'
    )
