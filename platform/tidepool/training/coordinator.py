"""The quorum of a run as an actor: takes reports in and answers them, probes who went silent, tells the driver what to do.

Plain; the driver makes it an actor of 0 CPUs. All that is decided, `quorum` decides; here are the clock and the sockets. Its
name belongs to the run, so that a run has one driver at a time in a cluster; it dies with the driver. Imports no torch.
"""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from tidepool.errors import RunError
from tidepool.messages import Pause, Request, Resize, Stop, Straggler, WorkerDeath
from tidepool.telemetry.logs import configure_logging
from tidepool.training.ledger import Ledger
from tidepool.training.membership import Directive, Quorum, Report, WorkerId
from tidepool.training.outcome import Outcome
from tidepool.training.quorum import QuorumMachine, Rules
from tidepool.training.quorum_events import (
    Claimed,
    ClaimNeeded,
    DriverSeen,
    Event,
    Fatal,
    Formed,
    GroupEnded,
    Kill,
    Over,
    Probe,
    Refused,
    Release,
    Reported,
    StopAsked,
    Tick,
)
from tidepool.training.straggling import Straggling

_logger = logging.getLogger(__name__)
_TICK_S = 0.05
_HOLD_S = 0.2
"""How long the report of a worker that waits is kept unanswered, so that a new quorum reaches it at once."""
_PROBE_TIMEOUT_S = 1.0
_COMPARE_EVERY_S = 1.0
_MAX_DEATHS = 100


@dataclass(frozen=True)
class Beginning:
    """What a coordinator starts from. `epoch` counts those that the driver had before; `account` is the `Ledger`'s of the base."""

    session: int
    claimed: Claimed
    committed: int
    min_groups: int
    max_groups: int
    epoch: int
    account: Mapping[str, Any]
    rules: Rules


@dataclass(frozen=True)
class Condemned:
    """A process that is to be killed."""

    worker: WorkerId
    pid: int
    node_id: str
    why: str


@dataclass(frozen=True)
class Orders:
    """What the driver is to do, and what it needs to know. `num_groups` is the number of replica groups that are wanted."""

    clock: float
    """This coordinator's, when it answered."""
    members: frozenset[int]
    """The groups of the quorum that takes steps now, if there is one."""
    num_groups: int
    heard: frozenset[int]
    """The groups of which a worker has reported."""
    gone: frozenset[int]
    """Those of them whose workers have all ended by themselves."""
    places: tuple[tuple[int, str], ...]
    """On which nodes (their ids) the groups' workers are."""
    is_stopping: bool
    is_pausing: bool
    condemned: tuple[Condemned, ...]
    needs_claim: bool
    fatal: str | None
    outcome: Outcome | None
    """How the run ended, None while it goes on."""
    deaths: tuple[WorkerDeath, ...] = ()
    stragglers: tuple[Straggler, ...] = ()


class Coordinator:
    """Runs in one event loop; every method is short."""

    def __init__(self) -> None:
        configure_logging()
        self._reports: dict[WorkerId, Report] = {}
        self._changed = asyncio.Event()
        self._probes: dict[WorkerId, asyncio.Task[None]] = {}
        self._condemned: list[Condemned] = []
        self._needs_claim = self._stopping = self._pausing = False
        self._newest_step = 0
        self._released: set[int] = set()
        self._deaths: dict[WorkerId, WorkerDeath] = {}
        self._straggling, self._compared_at = Straggling(), 0.0
        self._accounted: Quorum | None = None
        self._fatal: str | None = None
        self._outcome: Outcome | None = None
        self._begun = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None

    async def begin(self, beginning: Beginning) -> float:
        """Before anything else: the name is taken when the actor is made, the run is claimed after that. Returns this clock."""
        self._beginning, self._num_groups = beginning, beginning.max_groups
        claimed, now = beginning.claimed, time.monotonic()
        self._machine = QuorumMachine(beginning.rules, beginning.min_groups, claimed, beginning.committed, now, beginning.epoch)
        self._ledger = Ledger(time.time(), beginning.account)
        self._ticker = asyncio.get_running_loop().create_task(self._tick())
        self._begun.set()
        return now

    # --- Workers ------------------------------------------------------------------------------------------------------

    async def report(self, report: Report) -> Directive:
        """Take a report in and answer it; a worker that waits is answered when there is something for it, or after a while."""
        await self._begun.wait()
        if report.session != self._beginning.session:
            return Directive(report.sequence, self._beginning.epoch, leave=True)
        known = self._reports.get(report.worker)
        if known is None or report.sequence > known.sequence:
            self._reports[report.worker] = report
        if self._outcome is not None:
            return Directive(report.sequence, self._beginning.epoch, leave=True)
        self._newest_step = max(self._newest_step, report.step or 0)
        self._ledger.note_report(report)
        self._handle(Reported(report))
        directive = self._machine.directive(report, time.monotonic())
        if report.is_ready and directive.quorum is None and not directive.leave:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _HOLD_S)
            directive = self._machine.directive(report, time.monotonic())
        return directive

    async def account(self) -> dict[str, Any]:
        """Where the run's time went so far, see `ledger`."""
        await self._begun.wait()  # a worker may commit while the one before is being replaced
        return self._ledger.to_json(time.time())

    # --- The driver ---------------------------------------------------------------------------------------------------

    async def orders(self, heard_at: float) -> Orders:
        """What is to be done now; a process that is to be killed is named once. `heard_at`: see `driver_is_here`."""
        condemned, self._condemned = tuple(self._condemned), []
        self._handle(DriverSeen(heard_at))
        return Orders(
            clock=time.monotonic(),
            members=self._members(),
            num_groups=self._num_groups,
            heard=frozenset(worker.group for worker in self._reports),
            gone=self._gone(),
            places=tuple((one.worker.group, one.process.node_id) for one in self._reports.values() if one.process),
            is_stopping=self._stopping,
            is_pausing=self._pausing,
            condemned=condemned,
            needs_claim=self._needs_claim,
            fatal=self._fatal,
            outcome=self._outcome,
            deaths=tuple(self._deaths.values()),
            stragglers=self._stragglers(),
        )

    def _stragglers(self) -> tuple[Straggler, ...]:
        found = ((self._reports[worker], score) for worker, score in self._straggling.stragglers.items() if worker in self._reports)
        return tuple(Straggler(str(one.worker), one.process.node_id, round(score, 2)) for one, score in found if one.process)

    def _members(self) -> frozenset[int]:
        quorum = self._machine.current if self._machine.is_active else None
        return frozenset(worker.group for worker in quorum.workers) if quorum else frozenset()

    def _gone(self) -> frozenset[int]:
        num_gone = Counter(worker.group for worker, report in self._reports.items() if report.phase == "gone")
        return frozenset(worker.group for worker, report in self._reports.items() if num_gone[worker.group] == report.group_size)

    async def driver_is_here(self, heard_at: float) -> float:
        """The driver lives, whatever it is busy with: it has heard this clock, which is the answer, say `heard_at`."""
        self._handle(DriverSeen(heard_at))
        return time.monotonic()

    async def group_ended(self, group: int, failed: tuple[int, ...] = ()) -> tuple[int, str]:
        """A replica group is no more; returns the step that it held last, and the quorum that it entered last ("" if none).

        `failed` are the ranks of its workers that brought it about.
        """
        reports = [report for worker, report in self._reports.items() if worker.group == group]
        for rank in failed:
            self._note_death(WorkerId(group, rank))
        self._handle(GroupEnded(group))
        entered = max((report.quorum.number for report in reports if report.quorum), default=None)
        return max((report.step or 0 for report in reports), default=0), str(entered) if entered else ""

    async def claimed(self, claimed: Claimed) -> None:
        """Another incarnation was claimed."""
        self._needs_claim = False
        self._handle(claimed)

    async def release(self, groups: tuple[int, ...]) -> None:
        """Let these groups leave at the next step boundary."""
        self._released |= set(groups)
        self._handle(Release(groups))

    def _note_death(self, worker: WorkerId) -> None:
        """A worker died or had to be killed, on a node that the pool should look at if that happens there again."""
        report = self._reports.get(worker)
        is_asked_to = self._stopping or self._outcome is not None or worker.group in self._released
        if worker in self._deaths or is_asked_to or report is None or report.process is None or report.phase == "gone":
            return
        name = f"{self._beginning.session}/{worker}"
        self._deaths[worker] = WorkerDeath(name, report.process.node_id, time.time())
        if len(self._deaths) > _MAX_DEATHS:
            del self._deaths[next(iter(self._deaths))]

    # --- Whoever asks -------------------------------------------------------------------------------------------------

    async def set_outcome(self, outcome: Outcome) -> None:
        """Note how the run ended (by the worker of rank 0)."""
        self._outcome = outcome

    async def ask(self, request: Request) -> int:
        """Take a request in. Returns how many replica groups that makes, or, of a run that is to leave, the newest step that it holds.

        Raises `RunError` while the run is being started: a request that waited might be obeyed when nobody means it any more.
        """
        if not self._begun.is_set():
            raise RunError("The run is being started: ask again in a moment.")
        match request:
            case Resize(num_groups=num_groups):
                self._num_groups = min(max(num_groups, self._beginning.min_groups), self._beginning.max_groups)
            case Pause() | Stop():
                self._stopping, self._pausing = True, self._pausing or isinstance(request, Pause)
                self._handle(StopAsked())
                return self._newest_step
        return self._num_groups

    async def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    async def status(self) -> dict[str, Any]:
        """The run now, as JSON: `step`, `quorum`, `committed`, `groups`, and `workers`, each with its newest report."""
        await self._begun.wait()
        quorum = self._machine.current
        return {
            "stopping": self._stopping,
            "step": self._newest_step,
            "quorum": str(quorum.number) if quorum else None,
            "is_stepping": self._machine.is_active,
            "incarnation": quorum.incarnation if quorum else self._beginning.claimed.incarnation,
            "committed": self._machine.committed.step,
            "wanted_groups": self._num_groups,
            "groups": sorted({worker.group for worker in quorum.workers}) if quorum else [],
            "account": self._ledger.to_json(time.time()),
            "workers": [self._describe(report, quorum) for _, report in sorted(self._reports.items())],
        }

    def _describe(self, report: Report, quorum: Quorum | None) -> dict[str, Any]:
        process = asdict(report.process) if report.process else {}
        rank = quorum.workers.index(report.worker) if quorum and report.worker in quorum.workers else None
        entered = str(report.quorum.number) if report.quorum and report.is_active else None
        return {
            "group": report.worker.group,
            "rank_in_group": report.worker.rank,
            "rank": rank,
            "phase": report.phase,
            "step": report.step or 0,
            "score": self._straggling.scores.get(report.worker),
            "quorum": entered,
            **process,
        }

    # --- Events in, decisions out -------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        if isinstance(event, GroupEnded):
            self._reports = {worker: report for worker, report in self._reports.items() if worker.group != event.group}
        for decision in self._machine.handle(event, time.monotonic()):
            self._act(decision)
        quorum = self._machine.current
        if quorum is not None and quorum is not self._accounted:  # formed now, or adopted from the coordinator before
            self._accounted = quorum
            self._ledger.note_quorum(quorum, time.time())

    def _act(self, decision: Any) -> None:
        match decision:
            case Formed(quorum):
                _logger.info(
                    "quorum %s takes the steps after %d: workers %s", quorum.number, quorum.step, ", ".join(map(str, quorum.workers))
                )
                self._wake()
            case Over(number, why):
                _logger.info("quorum %s is over: %s", number, why)
                self._wake()
            case Probe(worker, address):
                if worker not in self._probes:
                    self._probes[worker] = asyncio.get_running_loop().create_task(self._probe(worker, address))
            case Kill(worker, why):
                report = self._reports.get(worker)
                if report is not None and report.process is not None:
                    self._condemned.append(Condemned(worker, report.process.pid, report.process.node_id, why))
                    self._note_death(worker)
            case ClaimNeeded():
                self._needs_claim = True
            case Fatal(message):
                self._fatal = message

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._handle(Tick())
            self._compare()

    def _compare(self) -> None:
        """Find out who is slower than the others of the quorum."""
        now, quorum = time.monotonic(), self._machine.current
        if now - self._compared_at >= _COMPARE_EVERY_S and quorum is not None and self._machine.is_active:
            self._compared_at = now
            self._straggling.note([self._reports[worker] for worker in quorum.workers if worker in self._reports], now)

    async def _probe(self, worker: WorkerId, address: str) -> None:
        """Find out whether a process is dead: only then does its node refuse the connection."""
        host, _, port = address.rpartition(":")
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), _PROBE_TIMEOUT_S)
        except ConnectionRefusedError:
            self._note_death(worker)
            self._handle(Refused(worker))
        except (OSError, TimeoutError):
            pass  # no proof of anything: the lease decides
        else:
            writer.close()
        await asyncio.sleep(_TICK_S)
        del self._probes[worker]
