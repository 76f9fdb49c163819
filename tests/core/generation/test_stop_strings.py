"""Stop strings: nothing of one leaks, nothing else is held, and how the text is cut does not matter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composeformer.errors import InputError
from composeformer.generation.stops import StopText

# Two letters make overlaps and half matches frequent.
texts = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


@st.composite
def cut(draw: st.DrawFn) -> list[str]:
    text = draw(texts)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


def judge(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(cut(), stops)
def test_pieces_joined_are_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    taken = StopText(stops)
    text = "".join(taken.push(piece) for piece in pieces) + taken.finish()
    assert (text, taken.stopped) == judge("".join(pieces), stops)


@given(cut(), stops)
def test_only_what_may_begin_a_stop_string_is_held(pieces: list[str], stops: list[str]) -> None:
    taken, out = StopText(stops), ""
    for index, piece in enumerate(pieces):
        out += taken.push(piece)
        seen = "".join(pieces[: index + 1])
        if taken.stopped is not None:
            return
        held = seen[len(out) :]
        assert seen.startswith(out)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_what_follows_a_stop_string_is_dropped() -> None:
    taken = StopText(["END"])
    assert [taken.push(p) for p in ("one E", "N", "D two", " three")] == ["one ", "", "", ""]
    assert taken.finish() == ""
    assert taken.stopped == "END"


@pytest.mark.parametrize("stop", ["text", [""], ["a", 3]])
def test_a_bad_stop_string_is_an_error(stop: object) -> None:
    with pytest.raises(InputError, match="stop = "):
        StopText(stop)  # type: ignore[arg-type]
