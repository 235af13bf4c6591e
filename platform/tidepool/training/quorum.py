"""Which replica groups take the next steps together: a pure state machine. Events in, decisions out; no clock, no network.

A quorum is over as soon as one of its workers has left it, is silent, is stuck or belongs to a group that ended. The next
one is formed from all groups that wait, whole, at a step boundary; the highest step among them wins.

Invariants (checked after every event, and from outside in tests/training/test_quorum.py):
- Only members of the quorum that goes on are given leases. A new quorum is formed only when every worker that may be taking
  steps in an older one has said that it left, is known to be dead, or its last lease has run out. So two quorums never step
  at once.
- Numbers only grow, also over a restart of the machine.
- No quorum starts below the newest commit that is known.
- A group is in a quorum whole or not at all; a worker without state hands none on.
- A group that was released is in no new quorum, unless all are and hold more than is committed: they meet once more, to commit it.
  So all groups leave amid a long step, too; and those of a run that is to stop.
- Workers that hold the same step must agree on its digest, else the run ends.
- Without a recent word from the driver, which may have started another machine, nothing is granted, formed or killed.

A restarted machine grants nothing until all that its predecessors can have granted has run out: one of them may live on, cut
off from the driver, and form quorums of workers that this machine does not see. Then, if every worker of the newest quorum
reports that it is in it, that quorum is adopted, and nobody has left it meanwhile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tidepool.training.membership import NONE, Committed, Directive, Number, Quorum, Report, WorkerId
from tidepool.training.quorum_events import (
    Claimed,
    ClaimNeeded,
    Decision,
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
    """How long a member may take to enter a quorum that was formed, or to stop waiting for others in one that is over."""
    unlearned_s: float = 600.0
    """The deadline of one thing in a phase (a shard, a batch, a commit) that has not been seen yet."""
    learned_factor: float = 10.0
    """The deadline is so many times the longest that was seen in this run, and between `least_s` and `unlearned_s`: waiting for
    somebody who hung is seen, too."""
    least_s: float = 10.0
    leave_s: float = 1.0
    """A group that is to go and has not come to the end of its step after this leaves in the middle: the others hold the state,
    or all go, and meet to commit it."""
    max_futile: int = 10
    """So many quorums without a new step, one after the other, end the run."""


# --- The machine ------------------------------------------------------------------------------------------------------

_WITH_PEERS = ("connect", "transfer", "exchange")
"""Phases in which a worker may wait for others."""
_CLOCK_MARGIN = 1.01
"""Clocks may run apart by one percent."""
_PROBE_EVERY_S = 0.25


@dataclass
class _Worker:
    report: Report
    received_at: float
    progress_at: float
    leased_at: float
    """When a lease was last given to it."""
    is_stuck: bool = False
    """It was found so, and has not moved since."""
    heard_at: float = 0.0
    """When it first said that it had heard that its quorum is over."""


@dataclass
class _Group:
    size: int
    workers: dict[int, _Worker] = field(default_factory=dict)
    is_ended: bool = False
    released_at: float | None = None

    @property
    def is_leaving(self) -> bool:
        return self.released_at is not None


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
        self._probed_at: dict[WorkerId, float] = {}
        self._driver_heard_at = float("-inf")
        self._handled_at = self._awake_since = now
        self._waits_until = now + (rules.driver_lease_s + rules.lease_s) * _CLOCK_MARGIN if epoch else now
        self.current: Quorum | None = None
        self._formed_at = now
        self.over = NONE
        self._count = 0
        self._slowest_s: dict[str, float] = {}
        self._futile = 0
        self._last_broken = ""
        self._stop_at: float | None = None
        """When the run was asked to stop."""
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
        if now - self._handled_at > self._rules.lease_s / 2:
            self._awake_since = now  # this process was held up itself: reports that came meanwhile are still to be handled
        self._handled_at = now
        self._note(event, now)
        decisions: list[Decision] = []
        if not self._is_fatal:
            for one in self._known():
                one.is_stuck = one.is_stuck or self._makes_no_progress(one)
            if has_driver := self._has_driver(now):
                self._take_over(now)
            self._end_current(now, decisions)
            if has_driver:
                self._form_next(now, decisions)
                self._kill_lost(now, decisions)
        self._check()
        return decisions

    def directive(self, report: Report, now: float) -> Directive:
        """The answer to a report that was taken in just now. It may give a lease, which is noted."""
        group = self._groups[report.worker.group]
        worker = group.workers[report.worker.rank]
        is_leased = self._gives_lease(worker, now)
        if is_leased:
            worker.leased_at = now
        is_member = self._is_member(report.worker)
        stay = {one.group for one in self.current.workers if not self._groups[one.group].is_leaving} if self.current else set()
        is_late = self._is_late(group, now) and bool(stay)
        return Directive(
            sequence=report.sequence,
            epoch=self._epoch,
            quorum=self.current if is_member else None,
            over=self.over,
            is_leased=is_leased,
            change=is_member and self._wants_change(now),
            stop=self._stop_at is not None,
            commit=is_member and not stay,
            leave=group.is_ended or (is_late if is_member else self._may_go(worker, now)),
            committed=self._committed,
        )

    # --- Taking in ----------------------------------------------------------------------------------------------------

    def _note(self, event: Event, now: float) -> None:
        match event:
            case Reported(report):
                self._take(report, now)
            case DriverSeen(heard_at):
                self._driver_heard_at = max(self._driver_heard_at, heard_at)
            case GroupEnded(group):
                self._groups.setdefault(group, _Group(0)).is_ended = True
            case Refused(worker):
                self._dead.add(worker)
            case Claimed():
                if event.incarnation > self._claimed.incarnation:
                    self._claimed, self._claim_asked = event, False
                    self._committed = Committed(event.incarnation, event.base_step)
            case Release(groups):
                for released in (self._groups.setdefault(number, _Group(0)) for number in groups):
                    released.released_at = now if released.released_at is None else released.released_at
            case StopAsked():
                self._stop_at = now if self._stop_at is None else self._stop_at
            case Tick():
                pass

    def _take(self, report: Report, now: float) -> None:
        group = self._groups.setdefault(report.worker.group, _Group(report.group_size))
        group.size = report.group_size
        before = group.workers.get(report.worker.rank)
        if before is None:
            worker = _Worker(report, now, now, now - self._rules.lease_s * _CLOCK_MARGIN, heard_at=now)
            group.workers[report.worker.rank] = worker
        elif report.sequence <= before.report.sequence:
            return  # late or twice
        else:
            worker = before
            if (report.phase, report.progress) != (worker.report.phase, worker.report.progress):
                worker.progress_at, worker.is_stuck = now, False
            if not _has_heard(before.report) and _has_heard(report):
                worker.heard_at = now
            worker.report, worker.received_at = report, now
        for phase, duration_s in report.slowest_s.items():
            self._slowest_s[phase] = max(duration_s, self._slowest_s.get(phase, 0.0))
        self._committed = max(self._committed, report.committed)
        self._last_broken = report.broken or self._last_broken
        quorum = report.quorum
        if quorum is not None and quorum == self.current and report.step is not None and report.step > quorum.step:
            self._futile = 0

    def _take_over(self, now: float) -> None:
        """After a restart: go on with the newest quorum if its every worker is here and in it, else end all that were before."""
        if not self._epoch or self.current is not None or self.over != NONE or now < self._waits_until:
            return
        entered = [worker.report.quorum for worker in self._known() if worker.report.quorum is not None]
        newest = max(entered, key=lambda quorum: quorum.number, default=None)
        if newest is not None and all(self._goes_on(one, newest, now) for one in newest.workers):
            self.current, self._formed_at = newest, now
            self.over = Number(newest.number.epoch, newest.number.count - 1)
        else:
            self.over = Number(self._epoch, 0)

    def _goes_on(self, one: WorkerId, quorum: Quorum, now: float) -> bool:
        worker = self._find(one)
        return worker is not None and self._is_present(worker, now) and worker.report.is_active and worker.report.quorum == quorum

    # --- Ending -------------------------------------------------------------------------------------------------------

    def _end_current(self, now: float, decisions: list[Decision]) -> None:
        if self.current is None or not self.is_active:
            return
        if why := self._why_over(self.current, now):
            self.over = self.current.number
            decisions.append(Over(self.over, why))

    def _why_over(self, quorum: Quorum, now: float) -> str:
        if quorum.incarnation < self._claimed.incarnation:
            return f"incarnation {self._claimed.incarnation} was claimed"
        for worker in self._known():
            if _entered(worker.report) > quorum.number:
                return f"worker {worker.report.worker} has been in the newer one {_entered(worker.report)}"
        members = [self._groups[one.group].workers[one.rank] for one in quorum.workers]
        for worker in members:
            report = worker.report
            if report.worker in self._dead:
                return f"worker {report.worker} is dead"
            if _entered(report) == quorum.number and not report.is_active:
                return f"worker {report.worker} left it at step {report.step}" + (f" ({report.broken})" if report.broken else "")
            if self._groups[report.worker.group].is_ended:
                return f"group {report.worker.group} has ended"
            if self._is_silent(worker, now):
                return f"worker {report.worker} is silent"
            if worker.is_stuck:
                return f"worker {report.worker} is stuck in {report.phase}"
        if all(self._waits_for_peers(worker) for worker in members):
            return "its workers wait for one another"
        asked_at = self._all_asked_at(quorum)
        is_late = asked_at is not None and self._formed_at <= asked_at < now - self._rules.leave_s
        if is_late and any(worker.report.phase == "step" for worker in members):
            return "all of it is to go, and its step is long"
        return ""

    def _all_asked_at(self, quorum: Quorum) -> float | None:
        """Since when all members are to commit and go."""
        if self._stop_at is not None or not self._all_leave:
            return self._stop_at
        times = [self._groups[one.group].released_at for one in quorum.workers]
        return max(at for at in times if at is not None)

    def _waits_for_peers(self, worker: _Worker) -> bool:
        return worker.report.phase in _WITH_PEERS and self._stands_s(worker) > self._deadline_s("exchange")

    def _makes_no_progress(self, worker: _Worker) -> bool:
        """Its main thread stands still, and not because it waits for others."""
        report = worker.report
        if report.phase == "wait":
            return self._is_member(report.worker) and self._stands_s(worker, self._formed_at) > self._rules.enter_s
        if report.phase in _WITH_PEERS:
            return report.is_active and _has_heard(report) and self._stands_s(worker, worker.heard_at) > self._rules.enter_s
        return self._stands_s(worker) > self._deadline_s(report.phase)

    def _stands_s(self, worker: _Worker, since: float = 0.0) -> float:
        """How long it has reported the same place. What it does while it is silent is not known, and not held against it."""
        return worker.received_at - max(worker.progress_at, since, self._awake_since)

    def _deadline_s(self, phase: str) -> float:
        rules, slowest_s = self._rules, self._slowest_s.get(phase)
        if slowest_s is None:
            return rules.unlearned_s
        return min(rules.unlearned_s, max(rules.least_s, rules.learned_factor * slowest_s))

    # --- Forming ------------------------------------------------------------------------------------------------------

    def _form_next(self, now: float, decisions: list[Decision]) -> None:
        if self.is_active or now < self._waits_until:
            return
        if unclear := [worker.report for worker in self._known() if not self._is_out(worker, now)]:
            for report in unclear:
                if now - self._probed_at.get(report.worker, float("-inf")) >= _PROBE_EVERY_S:
                    self._probed_at[report.worker] = now
                    decisions.append(Probe(report.worker, report.address))
            return
        groups = [group for number, group in sorted(self._groups.items()) if self._is_candidate(number, now)]
        if len(groups) >= (1 if self._all_leave else self._min_groups):
            reports = [group.workers[rank].report for group in groups for rank in range(group.size)]
            decisions += self._form(reports, now)

    def _form(self, reports: list[Report], now: float) -> list[Decision]:
        step = max((report.step for report in reports if report.step is not None and self._counts(report)), default=None)
        if step is None:
            if any(self._may_hold(group) for group in self._groups.values()):
                return []
            if self._claim_asked:
                return []
            if self._claimed.base_step < self._committed.step:
                self._claim_asked = True
                return [ClaimNeeded()]
        newest = [report for report in reports if step is not None and report.step == step]
        if fatal := self._why_fatal(newest, step):
            self._is_fatal = True
            return [fatal]
        source = newest[0].worker if newest else reports[0].worker if self._claimed.base else None
        behind = tuple(report.worker for report in reports if report not in newest and report.worker != source) if source else ()
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
        return [Formed(self.current)]

    def _why_fatal(self, newest: list[Report], step: int | None) -> Fatal | None:
        if len({report.digest for report in newest}) > 1:
            who = ", ".join(f"{report.worker} ({report.address})" for report in newest)
            return Fatal(
                f"the workers {who} disagree on what step {step} computed: one of their nodes does not compute correctly. "
                f"What was committed (step {self._committed.step}) is safe"
            )
        if step is not None and self.current is not None and step > self.current.step:
            self._futile = 0  # whoever was to report it has died since
        if self._futile >= self._rules.max_futile:
            why = f" The last one was left because of: {self._last_broken}" if self._last_broken else ""
            return Fatal(f"{self._futile} quorums one after the other completed no step; can the nodes reach one another?{why}")
        return None

    def _counts(self, report: Report) -> bool:
        return report.step is not None and report.step >= self._committed.step

    def _may_hold(self, group: _Group) -> bool:
        """Its silent workers hold newer state than those that wait, and are not given up yet."""
        workers = {worker.report.worker for worker in group.workers.values()}
        is_gone = group.is_ended or group.is_leaving or bool(workers & (self._dead | self._killed))
        return not is_gone and any(worker.report.is_active or self._counts(worker.report) for worker in group.workers.values())

    def _is_out(self, worker: _Worker, now: float) -> bool:
        """It takes no step in any quorum: it says so, it is dead, or its lease has run out. Who is alive and well is waited for."""
        if worker.report.worker in self._dead or (not worker.report.is_active and self._is_settled(worker)):
            return True
        return now - worker.leased_at >= self._rules.lease_s * _CLOCK_MARGIN and not self._is_present(worker, now)

    def _is_settled(self, worker: _Worker) -> bool:
        """It has heard that the last quorum that it may have been told to enter is over, or it was told of none."""
        if self.current is None or worker.report.worker not in self.current.workers:
            return True
        return max(_entered(worker.report), worker.report.over) >= self.over

    def _is_candidate(self, number: int, now: float) -> bool:
        group = self._groups[number]
        if group.is_leaving and not self._is_last_call(now):
            return False
        return self._is_whole(group, now) and all(worker.report.is_ready for worker in group.workers.values())

    def _is_whole(self, group: _Group, now: float) -> bool:
        is_there = group.size > 0 and len(group.workers) == group.size
        return is_there and all(self._is_present(worker, now) for worker in group.workers.values())

    # --- Going --------------------------------------------------------------------------------------------------------

    @property
    def _all_leave(self) -> bool:
        return all(group.is_leaving or group.is_ended for group in self._groups.values())

    def _is_late(self, group: _Group, now: float) -> bool:
        return group.released_at is not None and now - group.released_at > self._rules.leave_s

    def _is_last_call(self, now: float) -> bool:
        """All groups leave, and one that can still commit holds more than is committed."""
        if not self._all_leave:
            return False
        holders = (group for group in self._groups.values() if self._is_whole(group, now))
        steps = (worker.report.step for group in holders for worker in group.workers.values())
        return any(step is not None and step > self._committed.step for step in steps)

    def _may_go(self, worker: _Worker, now: float) -> bool:
        """It was released, is in no quorum, and nothing is left for it to commit."""
        is_released = self._groups[worker.report.worker.group].is_leaving
        return is_released and not worker.report.is_active and not self._is_last_call(now)

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

    def _is_member(self, one: WorkerId) -> bool:
        return self.is_active and self.current is not None and one in self.current.workers

    def _silent_s(self, worker: _Worker, now: float) -> float:
        return now - max(worker.received_at, self._awake_since)

    def _is_silent(self, worker: _Worker, now: float) -> bool:
        return self._silent_s(worker, now) > self._rules.lease_s

    def _is_present(self, worker: _Worker, now: float) -> bool:
        one = worker.report.worker
        is_gone = one in self._dead or self._groups[one.group].is_ended
        return not is_gone and not self._is_silent(worker, now) and not worker.is_stuck

    def _has_driver(self, now: float) -> bool:
        return now - self._driver_heard_at <= self._rules.driver_lease_s

    def _gives_lease(self, worker: _Worker, now: float) -> bool:
        is_member = self._is_member(worker.report.worker) and self.current is not None and _entered(worker.report) <= self.current.number
        return is_member and self._has_driver(now) and not self._is_fatal

    def _kill_lost(self, now: float, decisions: list[Decision]) -> None:
        """Exclude first, kill afterwards: nobody who is in a quorum that goes on."""
        for worker in self._known():
            one = worker.report.worker
            if one in self._killed or one in self._dead or self._groups[one.group].is_ended or self._is_member(one):
                continue
            silent_s = self._silent_s(worker, now)
            if silent_s > self._rules.lease_s + self._rules.kill_after_s:
                why = f"has said nothing for {silent_s:.0f} s"
            elif worker.is_stuck:
                why = f"has made no progress in {worker.report.phase} for {self._stands_s(worker):.0f} s"
            else:
                continue
            self._killed.add(one)
            decisions.append(Kill(one, why))

    def _check(self) -> None:
        quorum = self.current
        if quorum is None:
            return
        assert quorum.source not in quorum.behind, quorum
        assert quorum.source is None or quorum.source in quorum.workers, quorum
        assert set(quorum.behind) <= set(quorum.workers), quorum
        assert list(quorum.workers) == sorted(set(quorum.workers)), quorum
        for number in {worker.group for worker in quorum.workers}:
            ranks = [worker.rank for worker in quorum.workers if worker.group == number]
            assert ranks == list(range(self._groups[number].size)), quorum
        assert self.over <= quorum.number, (self.over, quorum.number)


def _entered(report: Report) -> Number:
    return report.quorum.number if report.quorum else NONE


def _has_heard(report: Report) -> bool:
    """The worker knows that the newest quorum that it entered is over."""
    return _entered(report) <= report.over
