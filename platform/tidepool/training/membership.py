"""What the workers of a run and its quorum say to each other. Light: the coordinator imports no torch for it.

A worker *reports* several times a second, and at once when something changes; each report is answered by a *directive*.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tidepool.messages import COORDINATOR_PREFIX


def coordinator_name(run: str) -> str:
    """The name of a run's coordinator actor in the namespace."""
    return COORDINATOR_PREFIX + run


@dataclass(frozen=True, order=True)
class WorkerId:
    """A worker: the number of its replica group in this driver's life (never used again), and its rank in the group."""

    group: int
    rank: int

    def __str__(self) -> str:
        return f"{self.group}.{self.rank}"


@dataclass(frozen=True, order=True)
class Number:
    """The number of a quorum. `epoch` counts the quorum actors that the run has had: a rebuilt one numbers above the one before."""

    epoch: int
    count: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.count}"


NONE = Number(0, 0)
"""Below the number of any quorum."""


@dataclass(frozen=True, order=True)
class Committed:
    """A commit's place: a later incarnation counts more than any step of an earlier one."""

    incarnation: int
    step: int


@dataclass(frozen=True)
class Quorum:
    """The workers that take the next steps together, by rank, and where they start.

    They go on from `step`: `source` hands its state to those `behind`. With `from_base` nobody's state counts: `source` reads
    the incarnation's base from the store first; where there is no base, every worker takes the initial state.
    """

    number: Number
    workers: tuple[WorkerId, ...]
    address: str
    """Where the worker of rank 0 lets the others meet."""
    step: int
    source: WorkerId | None
    behind: tuple[WorkerId, ...]
    incarnation: int
    base: str | None
    from_base: bool


@dataclass(frozen=True)
class Process:
    """Where a worker runs."""

    pid: int
    node_id: str
    node_ip: str
    library: str
    """Where its own copy of this library lies."""


@dataclass(frozen=True)
class Report:
    """What a worker is, and where its main thread stands.

    `phase` is load, wait (for a quorum), connect, restore, transfer, step, exchange, evaluate, commit, finish or gone (nothing comes
    after that); `progress` grows with each thing that is done in it. `slowest_s` has the longest time that one such thing has
    taken, by phase.
    """

    worker: WorkerId
    sequence: int
    group_size: int
    address: str
    phase: str = "load"
    progress: int = 0
    quorum: Quorum | None = None
    """The newest one that it entered."""
    is_active: bool = False
    """It is in that quorum still; it takes steps."""
    step: int | None = None
    """Completed steps of the state that it holds whole. None: it holds none, or one that is torn."""
    digest: str = ""
    """Of loss and gradient norm of that step."""
    committed: Committed = Committed(0, 0)
    """The newest commit that it knows of."""
    over: Number = NONE
    """It will enter no quorum up to this one any more."""
    broken: str = ""
    """Why it left its last quorum, where that was a failure."""
    slowest_s: Mapping[str, float] = field(default_factory=dict)
    spent_s: Mapping[str, float] = field(default_factory=dict)
    """The main thread's time so far, by phase."""
    num_steps: int = 0
    """Steps that this process has completed."""
    step_s: float = 0.0
    """The median time of the last of them."""
    shard_s: float = 0.0
    """The median time that computing one shard took this worker itself (see `straggling`), 0 while it has taken too few steps."""
    session: int = 0
    """The incarnation that the worker's driver began with: a worker of an earlier driver is not this one's."""
    process: Process | None = None

    @property
    def is_ready(self) -> bool:
        """It has loaded everything and waits to enter a quorum."""
        return self.phase == "wait" and not self.is_active


@dataclass(frozen=True)
class Directive:
    """What a worker shall do, in answer to one of its reports."""

    sequence: int
    """Of the report."""
    epoch: int
    quorum: Quorum | None = None
    """The one that it is to enter or to stay in."""
    over: Number = NONE
    """This quorum and all below it are over: their members leave at once."""
    is_leased: bool = False
    """The worker may take steps until the lease's duration after it sent the report."""
    change: bool = False
    """Members wait to come or to go: leave the quorum at the next step boundary."""
    stop: bool = False
    """Commit at the next step boundary and end."""
    commit: bool = False
    """Nobody who stays holds the state: commit it before you leave."""
    leave: bool = False
    """This worker is no longer wanted: end, and if it is in the middle of a step, now."""
    committed: Committed = Committed(0, 0)
    """The newest commit that anybody knows of."""
