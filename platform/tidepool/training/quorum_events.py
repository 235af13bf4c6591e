"""What the quorum machine takes in and what it decides: events and decisions. Plain and light; see `quorum`."""

from dataclasses import dataclass

from tidepool.training.membership import Number, Quorum, Report, WorkerId

# --- Events ---


@dataclass(frozen=True)
class Reported:
    """A worker's report arrived."""

    report: Report


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class DriverSeen:
    """The driver has been here. `heard_at` is what this machine's clock said in the last answer that it had got by then (0.0: none).

    So a word of the driver that was long under way grants nothing.
    """

    heard_at: float


@dataclass(frozen=True)
class GroupEnded:
    """The driver says that a replica group has ended: its processes are dead, or about to be."""

    group: int


@dataclass(frozen=True)
class Refused:
    """Nothing listens where this worker did: its process is dead."""

    worker: WorkerId


@dataclass(frozen=True)
class Claimed:
    """The driver has claimed an incarnation; `base` is the commit of `base_step` that it starts from."""

    incarnation: int
    base: str | None
    base_step: int


@dataclass(frozen=True)
class Release:
    """These groups shall leave at the next step boundary."""

    groups: tuple[int, ...]


@dataclass(frozen=True)
class StopAsked:
    """The run shall commit and stop."""


Event = Reported | Tick | DriverSeen | GroupEnded | Refused | Claimed | Release | StopAsked


# --- Decisions ---


@dataclass(frozen=True)
class Formed:
    """This quorum takes the next steps."""

    quorum: Quorum


@dataclass(frozen=True)
class Over:
    """This quorum takes no more steps."""

    number: Number
    why: str


@dataclass(frozen=True)
class Probe:
    """Find out whether the process of this worker is dead, and say so by `Refused`."""

    worker: WorkerId
    address: str


@dataclass(frozen=True)
class Kill:
    """End the process of this worker: its group is excluded and has not come back."""

    worker: WorkerId
    why: str


@dataclass(frozen=True)
class ClaimNeeded:
    """No worker holds the newest committed state: claim an incarnation that starts from it."""


@dataclass(frozen=True)
class Fatal:
    """The run cannot go on."""

    message: str


Decision = Formed | Over | Probe | Kill | ClaimNeeded | Fatal
