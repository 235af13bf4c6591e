"""What training, serving and the pool say to each other: what there is (a snapshot), what is to be done (decisions), what a
run is asked for, by the pool or by a person, and what runs and the arbiter tell each other.

Invariants:
- Everything here is frozen and holds plain values: it can be compared, recorded as JSON and sent through Ray.
- Times are seconds of one clock that only the shells read; `now_s` of a snapshot is that clock when it was taken.
- GPUs and CPUs are counted whole. On a node with GPUs, its CPUs go with them in equal parts.

Who fills in a snapshot and who carries decisions out is the business of the shells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Tier = Literal["premium", "standard", "basic"]
ReplicaState = Literal["starting", "running", "draining"]
Places = tuple[tuple[str, int], ...]
"""Where a gang runs: pairs of a node's name and how many of the workers are there."""


# --- What there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker or replica needs. Without GPUs it goes to nodes without GPUs only."""

    gpus: int = 0
    cpus: int = 1


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is up. `kind` is its device type: all groups of a run share one, because their arithmetic must.

    `domain` is the rack or zone, `labels` are `key=value`; `leaves_at_s` is set by a spot or maintenance notice.
    """

    name: str
    kind: str
    gpus: int
    cpus: int
    labels: frozenset[str] = frozenset()
    is_spot: bool = False
    domain: str = ""
    leaves_at_s: float | None = None
    quarantine: str = ""
    """Why it is in quarantine, if it is; then it leaves, too."""


@dataclass(frozen=True, slots=True)
class Template:
    """A kind of node that the cluster could still launch: `available` more, besides those `launching` already."""

    name: str
    kind: str
    gpus: int
    cpus: int
    available: int
    labels: frozenset[str] = frozenset()
    is_spot: bool = False
    launching: int = 0
    start_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica of a deployment, on one node."""

    name: str
    node: str
    state: ReplicaState = "running"


@dataclass(frozen=True, slots=True)
class Deployment:
    """What Serve wants of one deployment, and what it has. `needed` is what the traffic of this moment needs; None: all that is wanted."""

    name: str
    project: str
    wanted: int
    replica: Resources = Resources(gpus=1)
    replicas: tuple[Replica, ...] = ()
    priority: int = 0
    labels: frozenset[str] = frozenset()
    needed: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A replica group that a run was granted; `leaving` once it was asked back."""

    name: str
    places: Places
    granted_s: float
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """What a run wants and has. It takes no step with fewer than `min_groups`.

    `speeds` are measured steps per second, as pairs (groups, speed). `kind` is fixed by the first start. `waiting_since_s`
    is when it last had less than its min, `started_s` when it last got it, `resized_s` when its size last changed.
    `held_s` (seconds of the window with at least its min) and `used_gpu_s` are counted up to `as_of_s`; from there on the
    policy counts on by itself, so that a run that does not change need not be written anew.
    """

    name: str
    project: str
    min_groups: int
    max_groups: int
    shards: int
    submitted_s: float
    tier: Tier = "standard"
    priority: int = 0
    workers_per_group: int = 1
    worker: Resources = Resources(gpus=1)
    labels: frozenset[str] = frozenset()
    kind: str | None = None
    speeds: tuple[tuple[int, float], ...] = ()
    groups: tuple[Group, ...] = ()
    waiting_since_s: float | None = None
    started_s: float = 0.0
    resized_s: float = float("-inf")
    held_s: float = 0.0
    used_gpu_s: float = 0.0
    as_of_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """`gpus` (CPUs, for a kind without GPUs) that a project's runs find free from `starts_s` to `ends_s`."""

    name: str
    project: str
    kind: str
    gpus: int
    starts_s: float
    ends_s: float


@dataclass(frozen=True, slots=True)
class Quota:
    """The most that a project's deployments and runs may hold at a time; None: no limit."""

    project: str
    serving_gpus: int | None = None
    training_gpus: int | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the policy knows when it decides."""

    now_s: float
    nodes: tuple[Node, ...]
    deployments: tuple[Deployment, ...] = ()
    runs: tuple[Run, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    quotas: tuple[Quota, ...] = ()
    templates: tuple[Template, ...] = ()


# --- What a run is asked for -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resize:
    """Have so many replica groups, within the bounds of the run's spec."""

    run: str
    num_groups: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Commit at the next step and free everything; whoever shares the store can resume the run."""

    run: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Commit at the next step and end the job."""

    run: str


# --- What is to be done ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reason:
    """Why: the rule that decided and the facts it decided on; as a string, a sentence."""

    rule: str
    template: str
    facts: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.template.format(**self.facts)


@dataclass(frozen=True, slots=True)
class GrantGroup:
    """Start one replica group of a run, there."""

    run: str
    places: Places
    reason: Reason


@dataclass(frozen=True, slots=True)
class AskBack:
    """A group leaves at its next step boundary, and before `deadline_s` if there is one. Who wants all groups of a run pauses it."""

    run: str
    group: str
    reason: Reason
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Let a replica of a deployment start, there."""

    deployment: str
    node: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class DrainReplica:
    """A replica hands its requests over and ends, before `deadline_s`."""

    deployment: str
    replica: str
    reason: Reason
    deadline_s: float


@dataclass(frozen=True, slots=True)
class LaunchNodes:
    """Ask the cluster for nodes."""

    template: str
    count: int
    reason: Reason


Decision = GrantGroup | AskBack | StartReplica | DrainReplica | LaunchNodes
Request = Resize | Pause | Stop
"""What a run in a cluster takes. One that was paused is resumed by submitting it again: then there is nobody who could be told."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A run below its min, or a deployment below what it wants, by `missing` groups or replicas, and why."""

    name: str
    missing: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Plan:
    """The outcome of a round."""

    decisions: tuple[Decision, ...] = ()
    waits: tuple[Wait, ...] = ()


# --- What runs and the cluster tell the arbiter ------------------------------------------------------------------------

NAMESPACE = "tidepool"
"""Ray's namespace of everything of ours that has a name."""
ARBITER = "tidepool-arbiter"
"""The arbiter's name in it."""
COORDINATOR_PREFIX = "tidepool-run-"
"""With a run's name, that of its coordinator there."""


@dataclass(frozen=True, slots=True)
class Account:
    """What the policy must remember of a run, in seconds since 1970. The run carries it, so that the arbiter may forget: see `Run`."""

    submitted_s: float
    waiting_since_s: float | None
    started_s: float = 0.0
    resized_s: float = float("-inf")
    held_s: float = 0.0
    used_gpu_s: float = 0.0
    as_of_s: float = 0.0
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerDeath:
    """A worker process that ended though nobody had asked it to, or was stuck and had to be killed. `worker` is its name, used once."""

    worker: str
    node: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Straggler:
    """A worker that has long been slower than its peers. `score`: how fast it computes beside them, 1 is as fast; two digits."""

    worker: str
    node: str
    score: float


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a driver says of its run, again and again. `max_groups` is what it wants now; 0: it leaves, and what it still has goes.

    `groups` are those that it has and those that it is starting, each by the name of its grant; `settled` those of them whose
    workers have come. `account` is that of the newest answer.
    """

    run: str
    session: int
    """The incarnation that the driver began with: a later one takes its place."""
    store: str
    project: str
    tier: Tier
    priority: int
    min_groups: int
    max_groups: int
    shards: int
    workers_per_group: int
    worker: Resources
    labels: frozenset[str] = frozenset()
    groups: tuple[Group, ...] = ()
    settled: frozenset[str] = frozenset()
    account: Account | None = None
    deaths: tuple[WorkerDeath, ...] = ()
    """The last ones, for as long as the driver lives."""
    stragglers: tuple[Straggler, ...] = ()


@dataclass(frozen=True, slots=True)
class Grant:
    """A replica group that may start, there; `name` is never used again."""

    name: str
    places: Places
    reason: str


@dataclass(frozen=True, slots=True)
class Standing:
    """What the arbiter answers a driver. Grants are repeated until the run reports them."""

    grants: tuple[Grant, ...]
    leave: tuple[tuple[str, str], ...]
    """Groups that are asked back, by the names of their grants, each with the reason."""
    account: Account
    priority: int
    place: int | None = None
    """In the queue of runs below their min, from 1; None for a run that is not in it."""
    num_queued: int = 0
    reason: str = ""
    """Why it waits."""


@dataclass(frozen=True, slots=True)
class ReplicaActor:
    """An actor of Serve's that is, or shall be, a replica. `node` is "" while it has none; `is_alive` once it has started."""

    application: str
    deployment: str
    name: str
    node: str
    is_alive: bool
    resources: Resources


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What Ray says of the cluster now. `nodes` are those that are up, by their ids; `free` is what Ray could still place on each."""

    nodes: tuple[Node, ...]
    free: Mapping[str, Resources]
    replicas: tuple[ReplicaActor, ...] = ()
    templates: tuple[Template, ...] = ()
    runs: frozenset[str] = frozenset()
    """Those that have a driver."""
