"""Which replica groups take the next steps together: a pure state machine. Events in, decisions out; no clock, no network.

A quorum is over as soon as one of its workers has left it, is silent, is stuck or belongs to a group that ended. The next
one is formed from all groups that wait, whole, at a step boundary; the highest step among them wins.

Invariants (checked after every event, and from outside in tests/training/test_quorum.py):
- A new quorum is formed only when every worker that may be taking steps in an older one has said that it left, is known to
  be dead, or has had no lease for a lease's duration. So two quorums never step at once.
- Numbers only grow, also over a restart of the machine.
- No quorum starts below the newest commit that is known.
- A group is in a quorum whole or not at all; a worker without state hands none on.
- Workers that hold the same step must agree on its digest, else the run ends.

A restarted machine waits until all that its predecessor can have granted has run out, unless every worker of one quorum reports
to it that it goes on: then that quorum is adopted, and nobody stops.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tidepool.training.membership import NONE, Committed, Directive, Number, Quorum, Report, WorkerId


@dataclass(frozen=True)
class Rules:
    """Durations in seconds. Clocks may differ between machines; how fast they go must not (much)."""

    lease_s: float = 2.0
    """How long a worker may step on after it sent a report that was answered; a longer silence excludes its group."""
    driver_lease_s: float = 5.0
    """How long leases are given without a word from the driver, which starts another machine when this one is lost."""
    kill_after_s: float = 10.0
    """After so much more silence the processes of an excluded group are killed."""
    enter_s: float = 20.0
    """How long a member may take to enter a quorum that was formed."""
    unlearned_s: float = 600.0
    """The deadline of one thing in a phase (a shard, a batch, a commit) that has not been seen yet."""
    learned_factor: float = 10.0
    """The deadline is so many times the longest that was seen in this run, and `least_s` at least."""
    least_s: float = 10.0
    max_futile: int = 10
    """So many quorums without a new step, one after the other, end the run."""


# --- Events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reported:
    """A worker's report arrived."""

    report: Report


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class DriverSeen:
    """The driver has been here."""


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


# --- Decisions --------------------------------------------------------------------------------------------------------


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


# --- The machine ------------------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    report: Report
    received_at: float
    progress_at: float
    leased_at: float
    """When a lease was last given to it."""


@dataclass
class _Group:
    size: int
    workers: dict[int, _Worker] = field(default_factory=dict)
    is_ended: bool = False
    is_leaving: bool = False


class QuorumMachine:
    """See the module's docstring. `now` is in seconds of one clock that never goes back."""

    def __init__(self, rules: Rules, min_groups: int, claimed: Claimed, committed: int, now: float, epoch: int = 0) -> None:
        """`committed` is the newest commit's step in the store; `epoch` counts the machines that this run's driver has made before."""
        self._rules, self._min_groups, self._epoch = rules, min_groups, epoch
        self._claimed = claimed
        self._committed = Committed(claimed.incarnation, max(committed, claimed.base_step))
        self._claim_asked = False
        self._groups: dict[int, _Group] = {}
        self._dead: set[WorkerId] = set()
        self._killed: set[WorkerId] = set()
        self._driver_seen_at = now
        self._waits_until = now + rules.driver_lease_s + rules.lease_s if epoch else now
        self.current: Quorum | None = None
        self._formed_at = now
        self.over = NONE
        self._count = 0
        self._slowest_s: dict[str, float] = {}
        self._futile = 0
        self._last_broken = ""
        self._stopping = False
        self._is_fatal = False

    @property
    def committed(self) -> Committed:
        """The newest commit that is known."""
        return self._committed

    @property
    def is_active(self) -> bool:
        """There is a quorum, and it is not over."""
        return self.current is not None and self.current.number > self.over

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Take an event in and say what is to be done."""
        decisions: list[Decision] = []
        match event:
            case Reported(report):
                self._take(report, now)
            case DriverSeen():
                self._driver_seen_at = now
            case GroupEnded(group):
                self._groups.setdefault(group, _Group(0)).is_ended = True
            case Refused(worker):
                self._dead.add(worker)
            case Claimed():
                if event.incarnation > self._claimed.incarnation:
                    self._claimed, self._claim_asked = event, False
                    self._committed = Committed(event.incarnation, event.base_step)
            case Release(groups):
                for group in groups:
                    self._groups.setdefault(group, _Group(0)).is_leaving = True
            case StopAsked():
                self._stopping = True
            case Tick():
                pass
        if not self._is_fatal:
            self._adopt(now)
            self._end_current(now, decisions)
            self._form_next(now, decisions)
            self._kill_lost(now, decisions)
        self._check()
        return decisions

    def directive(self, report: Report, now: float) -> Directive:
        """The answer to a report that was taken in just now."""
        group = self._groups[report.worker.group]
        member = self.current if self.is_active and self.current and report.worker in self.current.workers else None
        is_out = not report.is_active
        return Directive(
            sequence=report.sequence,
            epoch=self._epoch,
            quorum=member,
            over=self.over,
            is_leased=self._gives_lease(report.worker, now),
            change=member is not None and self._wants_change(now),
            stop=self._stopping,
            leave=group.is_ended or (group.is_leaving and is_out and member is None),
            committed=self._committed,
        )

    # --- Taking in ----------------------------------------------------------------------------------------------------

    def _take(self, report: Report, now: float) -> None:
        group = self._groups.setdefault(report.worker.group, _Group(report.group_size))
        group.size = report.group_size
        before = group.workers.get(report.worker.rank)
        if before is not None and report.sequence <= before.report.sequence:
            return  # late or twice
        has_moved = before is None or (before.report.phase, before.report.progress) != (report.phase, report.progress)
        progress_at = now if before is None or has_moved else before.progress_at
        worker = _Worker(report, now, progress_at, before.leased_at if before else now - self._rules.lease_s)
        group.workers[report.worker.rank] = worker
        if self._gives_lease(report.worker, now):
            worker.leased_at = now
        for phase, duration_s in report.slowest_s.items():
            self._slowest_s[phase] = max(duration_s, self._slowest_s.get(phase, 0.0))
        self._committed = max(self._committed, report.committed)
        self._last_broken = report.broken or self._last_broken
        quorum = report.quorum
        if quorum is not None and quorum == self.current and report.step is not None and report.step > quorum.step:
            self._futile = 0

    def _adopt(self, now: float) -> None:
        """After a restart: go on with the quorum whose every worker is here and in it."""
        if not self._epoch or self.current is not None:
            return
        active = {worker.report.worker: worker.report for worker in self._known() if self._is_present(worker, now)}
        for report in active.values():
            quorum = report.quorum
            if quorum is not None and report.is_active and quorum.number > self.over:
                same = (active[one].quorum == quorum and active[one].is_active for one in quorum.workers if one in active)
                if all(one in active for one in quorum.workers) and all(same):
                    self.current, self._formed_at, self._waits_until = quorum, now, now
                    return

    # --- Ending -------------------------------------------------------------------------------------------------------

    def _end_current(self, now: float, decisions: list[Decision]) -> None:
        if self.current is None or not self.is_active:
            return
        if why := self._why_over(self.current, now):
            self.over = self.current.number
            decisions.append(Over(self.over, why))

    def _why_over(self, quorum: Quorum, now: float) -> str:
        workers = [(one, self._find(one)) for one in quorum.workers]
        for one, worker in workers:
            if one in self._dead:
                return f"worker {one} is dead"
            if worker is None:
                continue
            report = worker.report
            if report.quorum is not None and report.quorum.number == quorum.number and not report.is_active:
                return f"worker {one} left it at step {report.step}" + (f" ({report.broken})" if report.broken else "")
            if self._groups[one.group].is_ended:
                return f"group {one.group} has ended"
            if now - worker.received_at > self._rules.lease_s:
                return f"worker {one} is silent"
            if self._is_stuck(worker, now):
                return f"worker {one} is stuck in {report.phase}"
        if all(worker is not None and self._waits_for_peers(worker, now) for _, worker in workers):
            return "its workers wait for one another"
        return ""

    def _waits_for_peers(self, worker: _Worker, now: float) -> bool:
        return worker.report.phase in ("exchange", "connect", "transfer") and now - worker.progress_at > self._deadline_s("exchange")

    def _is_stuck(self, worker: _Worker, now: float) -> bool:
        """Its main thread makes no progress, and not because it waits for others."""
        report, since_s = worker.report, now - worker.progress_at
        if report.phase == "wait":
            is_member = self.is_active and self.current is not None and report.worker in self.current.workers
            return is_member and now - max(self._formed_at, worker.progress_at) > self._rules.enter_s
        if report.phase in ("exchange", "connect", "transfer"):
            return False
        return since_s > self._deadline_s(report.phase)

    def _deadline_s(self, phase: str) -> float:
        slowest_s = self._slowest_s.get(phase)
        if slowest_s is None:
            return self._rules.unlearned_s
        return max(self._rules.least_s, self._rules.learned_factor * slowest_s)

    # --- Forming ------------------------------------------------------------------------------------------------------

    def _form_next(self, now: float, decisions: list[Decision]) -> None:
        if self.is_active:
            return
        if now < self._waits_until:
            return
        if self._epoch and self.current is None:
            self.over = max(self.over, Number(self._epoch, 0))
        if unclear := [worker for worker in self._known() if not self._is_out(worker, now)]:
            decisions += [Probe(worker.report.worker, worker.report.address) for worker in unclear]
            return
        groups = [group for number, group in sorted(self._groups.items()) if self._is_candidate(number, now)]
        if len(groups) < self._min_groups:
            return
        if self._futile >= self._rules.max_futile:
            self._is_fatal = True
            why = f" The last one was left because of: {self._last_broken}" if self._last_broken else ""
            decisions.append(Fatal(f"{self._futile} quorums one after the other completed no step; can the nodes reach one another?{why}"))
            return
        reports = [group.workers[rank].report for group in groups for rank in range(group.size)]
        self._form(reports, now, decisions)

    def _form(self, reports: list[Report], now: float, decisions: list[Decision]) -> None:
        holders = [report for report in reports if report.step is not None and report.step >= self._committed.step]
        step = max((report.step for report in holders if report.step is not None), default=None)
        if step is None and (self._claimed.base_step < self._committed.step or self._claim_asked):
            if not self._claim_asked:
                self._claim_asked = True
                decisions.append(ClaimNeeded())
            return
        newest = [report for report in holders if report.step == step]
        if len({report.digest for report in newest}) > 1:
            self._is_fatal = True
            who = ", ".join(f"{report.worker} ({report.address})" for report in newest)
            decisions.append(
                Fatal(
                    f"the workers {who} disagree on what step {step} computed: one of their nodes does not compute correctly. "
                    f"What was committed (step {self._committed.step}) is safe"
                )
            )
            return
        source = newest[0].worker if step is not None else reports[0].worker if self._claimed.base else None
        if step is not None:
            behind = tuple(report.worker for report in reports if report.step != step)
        else:
            behind = tuple(report.worker for report in reports if report.worker != source) if source else ()
        self._count += 1
        self._futile += 1
        self.current = Quorum(
            number=Number(self._epoch, self._count),
            workers=tuple(report.worker for report in reports),
            address=reports[0].address,
            step=self._claimed.base_step if step is None else step,
            source=source,
            behind=behind,
            incarnation=self._claimed.incarnation,
            base=self._claimed.base,
            from_base=step is None,
        )
        self._formed_at = now
        decisions.append(Formed(self.current))

    def _is_out(self, worker: _Worker, now: float) -> bool:
        """It takes no step in any quorum: it says so, it is dead, or its lease has run out and is not renewed."""
        if worker.report.worker in self._dead or (not worker.report.is_active and self._is_settled(worker)):
            return True
        return now - worker.leased_at >= self._rules.lease_s and not self._gives_lease(worker.report.worker, now)

    def _is_settled(self, worker: _Worker) -> bool:
        """It has heard that the last quorum that it may have been told to enter is over."""
        is_ours = self.current is not None and self.current.number.epoch == self._epoch
        if is_ours and self.current is not None and worker.report.worker not in self.current.workers:
            return True
        entered = worker.report.quorum.number if worker.report.quorum else NONE
        return max(entered, worker.report.over) >= self.over

    def _is_candidate(self, number: int, now: float) -> bool:
        group = self._groups[number]
        if group.is_ended or group.is_leaving or not group.size or len(group.workers) < group.size:
            return False
        return all(worker.report.is_ready and self._is_present(worker, now) for worker in group.workers.values())

    def _wants_change(self, now: float) -> bool:
        assert self.current is not None
        members = {worker.group for worker in self.current.workers}
        comes = any(self._is_candidate(number, now) for number in self._groups if number not in members)
        return comes or any(self._groups[number].is_leaving for number in members)

    # --- What is known of workers -------------------------------------------------------------------------------------

    def _known(self) -> Iterator[_Worker]:
        for group in self._groups.values():
            yield from group.workers.values()

    def _find(self, one: WorkerId) -> _Worker | None:
        group = self._groups.get(one.group)
        return group.workers.get(one.rank) if group else None

    def _is_present(self, worker: _Worker, now: float) -> bool:
        is_silent = now - worker.received_at > self._rules.lease_s
        return worker.report.worker not in self._dead and not is_silent and not self._is_stuck(worker, now)

    def _gives_lease(self, one: WorkerId, now: float) -> bool:
        """Whether a report of this worker, if it comes now, is answered with a lease."""
        worker = self._find(one)
        if worker is None or self._groups[one.group].is_ended or self._is_fatal:
            return False
        newest = worker.report.quorum.number if worker.report.quorum else NONE
        if now - self._driver_seen_at > self._rules.driver_lease_s or newest.epoch > self._epoch:
            return False
        return self._is_present(worker, now)

    def _kill_lost(self, now: float, decisions: list[Decision]) -> None:
        for worker in self._known():
            one = worker.report.worker
            if one in self._killed or one in self._dead:
                continue
            silent_s = now - worker.received_at
            if silent_s > self._rules.lease_s + self._rules.kill_after_s:
                why = f"has said nothing for {silent_s:.0f} s"
            elif self._is_stuck(worker, now) and not self._is_pending(one):
                why = f"has made no progress in {worker.report.phase} for {now - worker.progress_at:.0f} s"
            else:
                continue
            self._killed.add(one)
            decisions.append(Kill(one, why))

    def _is_pending(self, one: WorkerId) -> bool:
        """It is still in a quorum that goes on: exclude first, kill afterwards."""
        return self.is_active and self.current is not None and one in self.current.workers

    def _check(self) -> None:
        quorum = self.current
        if quorum is None:
            return
        assert quorum.source not in quorum.behind, quorum
        assert quorum.source is None or quorum.source in quorum.workers, quorum
        assert set(quorum.behind) <= set(quorum.workers), quorum
        assert list(quorum.workers) == sorted(set(quorum.workers)), quorum
        groups = {worker.group for worker in quorum.workers}
        for number in groups:
            present: Iterable[int] = (worker.rank for worker in quorum.workers if worker.group == number)
            assert list(present) == list(range(self._groups[number].size)) or not self._groups[number].size, quorum
        assert self.over <= max(quorum.number, Number(self._epoch, 0)), (self.over, quorum.number)
