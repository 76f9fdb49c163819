"""Stop strings in streamed text: none of one ever leaks, and nothing else is held back longer than it must.

What is held is the longest end of the text so far that could be the beginning of a stop string. The match
that *ends* first wins, then the one that began first; so the result is the same however text is cut.
"""

from collections.abc import Sequence

from composeformer.errors import InputError, show


class StopText:
    """Text with stop strings taken out: `push` pieces, then `finish`. Once `stopped` it takes no more."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """Raises InputError for a stop string that is empty or no string."""
        if isinstance(stops, str):
            raise InputError(f"stop = {show(stops)}: must be a list of strings")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise InputError(f"stop = {show(stop)}: must be a non-empty string")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped: str | None = None

    def push(self, piece: str) -> str:
        """Adds text; returns what has become certain: not part of a stop string, nor after one."""
        if self.stopped is not None:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        certain = len(text) - self._ending(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The text that was held, now that none follows."""
        held, self._held = self._held, ""
        return held

    def _ending(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stops), default=0))
        for length in range(longest, 0, -1):
            ending = text[-length:]
            if any(stop.startswith(ending) for stop in self._stops):
                return length
        return 0
