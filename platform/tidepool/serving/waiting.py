"""How long requests wait for their first token, as a replica sees it. Pure."""

from collections import deque
from collections.abc import Callable

LATEST_S = 20.0
_NEARLY_ALL = 0.9


class Waits:
    """Waits of requests that are over, for a while, and of those that go on."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}
        self._over: deque[tuple[float, float]] = deque()  # when it was over, how long it took

    def begin(self, request_id: str) -> None:
        """A request waits."""
        self._since[request_id] = self._clock()

    def answer(self, request_id: str) -> None:
        """Its first token is there; nothing if it was before."""
        if (since := self._since.pop(request_id, None)) is not None:
            self._over.append((self._clock(), self._clock() - since))

    def leave(self, request_id: str) -> None:
        """It waits no longer, whatever came of it."""
        self._since.pop(request_id, None)

    @property
    def ttft_s(self) -> float:
        """The longest that nearly all of the latest requests have waited, or that one waits already; 0 without any."""
        now = self._clock()
        while self._over and self._over[0][0] < now - LATEST_S:
            self._over.popleft()
        over = sorted(took for _, took in self._over)
        nearly_all = over[min(len(over) - 1, int(_NEARLY_ALL * len(over)))] if over else 0.0
        return max([nearly_all, *(now - since for since in self._since.values())])
