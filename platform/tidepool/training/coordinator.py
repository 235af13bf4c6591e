"""What the driver, the workers and a person who looks on know of a run that is going on. Plain; the driver makes it an actor.

Its name belongs to the run, so that a run has one driver at a time in a cluster; it dies with the driver.
"""

from dataclasses import asdict, dataclass
from typing import Any

from tidepool.training.outcome import Outcome


@dataclass(frozen=True)
class Heartbeat:
    """What a worker is doing: `phase` is load, step, evaluate or commit; `step` counts completed steps."""

    incarnation: int
    rank: int
    step: int
    phase: str
    pid: int
    node_id: str
    library: str
    """Where the worker's own copy of this library lies."""


class Coordinator:
    """Takes heartbeats and the outcome; hands out the wish to stop."""

    def __init__(self) -> None:
        self._stopping = False
        self._beats: dict[int, Heartbeat] = {}
        self._outcome: Outcome | None = None

    def heartbeat(self, beat: Heartbeat) -> bool:
        """Note what a worker does; returns whether the run is to stop after a commit."""
        newest = max((one.incarnation for one in self._beats.values()), default=0)
        if beat.incarnation > newest:
            self._beats.clear()
        if beat.incarnation >= newest:
            self._beats[beat.rank] = beat
        return self._stopping

    def request_stop(self) -> bool:
        """Ask the workers to commit and leave; returns whether there are any that can hear it."""
        self._stopping = True
        return bool(self._beats)

    def set_outcome(self, outcome: Outcome) -> None:
        """Note how the run ended (by the worker of rank 0)."""
        self._outcome = outcome

    def outcome(self) -> Outcome | None:
        """How the run ended, None while it goes on."""
        return self._outcome

    def status(self) -> dict[str, Any]:
        """`workers`: the newest heartbeat of each, by rank, as JSON."""
        return {"stopping": self._stopping, "workers": [asdict(beat) for _, beat in sorted(self._beats.items())]}
