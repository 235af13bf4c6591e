"""What the step loop tells the outside and asks of it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Wishes:
    """What somebody wants of the run, at the next step boundary."""

    stop: bool = False
    """Commit and end."""
    change: bool = False
    """Leave the quorum: members wait to come or to go."""
    commit: bool = False
    """Commit before that, because all members go."""


class Watch(Protocol):
    """Five methods: one to be seen by, one for the state, one before what cannot be taken back, two to ask."""

    def tick(self, phase: str) -> None:
        """The main thread has done one thing and begins another, in this phase (see `membership.Report`)."""
        ...

    def holds(self, step: int | None, digest: str, shard_s: float = 0.0) -> None:
        """The state is whole, after so many steps; None while it is torn. `digest` is that of the step's loss and gradient norm.

        `shard_s` are the seconds that this worker took to compute one shard of that step, 0 if it computed none.
        """
        ...

    def check(self) -> None:
        """Return if the quorum goes on and this worker may act in it; waits while that is unclear. Raises `QuorumLost`."""
        ...

    def wishes(self) -> Wishes:
        """What is wanted, as far as is known here."""
        ...

    def committed_step(self) -> int:
        """The newest step that is known to be committed, 0 if none is."""
        ...
