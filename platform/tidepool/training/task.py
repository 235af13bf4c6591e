"""What a worker is told when it starts. Imports no torch: the launcher of a replica group and Ray Train's controller read it too."""

from dataclasses import dataclass

from tidepool.specs import RunSpec


@dataclass(frozen=True)
class Pins:
    """What a run's names meant when it began: `name@digest`, and the base as `name@3` (or a path) with its digest."""

    dataset: str
    base: str | None
    base_digest: str | None


@dataclass(frozen=True)
class Task:
    """What a worker has to do: its part of `spec`, with its names meaning `pins`, for the driver that began with this incarnation."""

    spec: RunSpec
    pins: Pins
    session: int
