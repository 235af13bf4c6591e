"""Ending a text before the first of several strings.

Invariants: nothing comes out that belongs, or may yet belong, to a stop string; what comes out in the end does not depend on
how the text was cut into pieces. Of stop strings that overlap the one that is complete first counts.
"""


class StopStrings:
    """Passes text on up to a stop string, and holds back what may become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string ended it."""
        held = self._held + text
        found = [(index + len(stop), index) for stop in self._stops if (index := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)[1]], True
        cut = len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[cut:]
        return held[:cut], False

    def finish(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that begins the stop string."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)
