"""The quorum machine: examples of what it decides, and properties that hold in every simulated life (see quorum_world.py).

Properties, looked at from outside at every event:
- two quorums: the quorum *in effect* is the one that a machine, whichever, formed or adopted last. Whoever may complete a step
  without a further word (it has entered a quorum or is told to, that one is not over for it, its lease runs) may do so in the quorum
  in effect alone. So no step of a quorum is completed after the next one was formed, also where two machines live.
- one history: all that is exchanged in a round starts from the same state; round r of a quorum completes its step + r; a step has
  one digest, whoever computes it and however often.
- below the commit: no quorum starts below the newest commit that its machine was told of; highest step: nor below any of its
  workers; incarnation: nor does one go on in an incarnation that is known to be closed.
- source, behind, not ready: a quorum is what its workers said last; only whole state of its step is handed on, or gone on with.
- whole groups, min groups, numbers: a group is in whole or not at all; numbers grow over all machines.
- killed: nobody whose reports arrive and whose main thread moves is killed. fatal: nor is the run ended.
- nothing lost: a run that is paused, and that nothing else befalls, has committed its newest step when its groups are gone.
- progress: some time after the last fault every group that is alive takes steps in the one quorum of the newest incarnation; who
  stopped is back in line, who hangs for good was found, killed and replaced.

Planted bugs, each found by the same lives that the machine passes: see `PLANTED`. Not found so: a machine that believes reports
which were overtaken; what a worker has heard to be over guards against them too. An example looks at that alone.

`TIDEPOOL_LIVES=5000` lives longer than the default. A life that fails is repeated by `live(seed)`.
"""

import collections
import os
from dataclasses import replace
from typing import Any

import pytest

from tests.training.quorum_properties import Broken
from tests.training.quorum_world import RULES, World, live
from tidepool.training.membership import Committed, Directive, Number, Quorum, Report, WorkerId
from tidepool.training.quorum import QuorumMachine
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

NUM_LIVES = int(os.environ.get("TIDEPOOL_LIVES", "530"))


@pytest.mark.parametrize("part", range(8))
def test_every_property_holds_in_every_life(part: int) -> None:
    for seed in range(part, NUM_LIVES, 8):
        live(seed)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("num_shards", [1, 40])
def test_a_run_that_is_paused_has_committed_its_newest_step_and_is_soon_gone(seed: int, num_groups: int, num_shards: int) -> None:
    world = World(seed, sizes=(1,) * num_groups, min_groups=num_groups)
    world.num_shards = num_shards
    assert world.run_until(90.0, lambda: len(world.properties.steps) >= 2 * num_groups)
    world.run_until(world.now + 1.0 + seed / 10)
    world.release_all(pause_s=1000.0)
    assert world.run_until(world.now + 4.0, lambda: all(worker.is_dead for worker in world.workers.values())), world.log[-30:]
    assert world.store.newest.step == max(step for _, _, _, step in world.properties.steps), world.log[-30:]


# --- Planted bugs -----------------------------------------------------------------------------------------------------


class ForgetsLeases(QuorumMachine):
    """Takes who is silent for out at once, though its lease may still run."""

    def _is_out(self, worker: Any, now: float) -> bool:
        return super()._is_out(worker, now) or not self._is_present(worker, now)


class GoesOnAtOnce(QuorumMachine):
    """Grants from its start on, though what its predecessors granted may still run."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._waits_until = self._handled_at


class IgnoresCommits(QuorumMachine):
    """Goes on from the highest step that somebody holds, though a higher one was committed."""

    def _counts(self, report: Report) -> bool:
        return report.step is not None


class TakesTornState(QuorumMachine):
    """Takes a worker that holds no whole state for one that holds what was committed."""

    def _form(self, reports: list[Report], now: float) -> list[Decision]:
        return super()._form([replace(report, step=report.step or self._committed.step) for report in reports], now)


class ForgetsWhomItTold(QuorumMachine):
    """Takes a member that has not entered yet for out: it was told, and will enter."""

    def _is_settled(self, worker: Any) -> bool:
        return True


class NumbersAnew(QuorumMachine):
    """Counts from one again after a restart."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._epoch = 0


class FormsWithParts(QuorumMachine):
    """Takes the part of a group that has reported for the group."""

    def _take(self, report: Report, now: float) -> None:
        super()._take(report, now)
        group = self._groups[report.worker.group]
        group.size = min(group.size, 1) if 0 in group.workers else group.size


class LeasesToAll(QuorumMachine):
    """Leases whoever reports, whatever quorum it is in."""

    def _gives_lease(self, worker: Any, now: float) -> bool:
        return self._has_driver(now) and self._is_present(worker, now)


class TrustsOldWords(QuorumMachine):
    """Takes a word of the driver that was long under way for a new one."""

    def _note(self, event: Event, now: float) -> None:
        super()._note(DriverSeen(now) if isinstance(event, DriverSeen) else event, now)


class GoesOnWithoutDriver(QuorumMachine):
    """Forms quorums though the driver may have started another machine."""

    def _has_driver(self, now: float) -> bool:
        return True


class AdoptsWhatItSees(QuorumMachine):
    """Adopts a quorum though some of its workers have not said that they are in it."""

    def _goes_on(self, one: WorkerId, quorum: Quorum, now: float) -> bool:
        return self._find(one) is None or super()._goes_on(one, quorum, now)


class GoesOnInAClosedIncarnation(QuorumMachine):
    """Lets a quorum go on whose commits are refused."""

    def _why_over(self, quorum: Quorum, now: float) -> str:
        return super()._why_over(replace(quorum, incarnation=self._claimed.incarnation), now)


class WaitsForever(QuorumMachine):
    """Believes that whoever waits for others will go on, also in a quorum that is over."""

    def _makes_no_progress(self, worker: Any) -> bool:
        return worker.report.phase not in ("connect", "transfer", "exchange") and super()._makes_no_progress(worker)


class NeverDoubtsAWait(QuorumMachine):
    """Lets a quorum go on whose workers all wait for one another."""

    def _waits_for_peers(self, worker: Any) -> bool:
        return False


class JudgesTheSilent(QuorumMachine):
    """Holds against a worker that it stood still while nothing was heard of it."""

    def _stands_s(self, worker: Any, since: float = 0.0) -> float:
        since = max(worker.progress_at, since, self._awake_since)
        return self._handled_at - since


PLANTED: dict[type[QuorumMachine], int] = {
    ForgetsLeases: 0,
    GoesOnAtOnce: 100,
    IgnoresCommits: 500,
    TakesTornState: 0,
    ForgetsWhomItTold: 0,
    NumbersAnew: 0,
    FormsWithParts: 0,
    LeasesToAll: 400,
    TrustsOldWords: 0,
    GoesOnWithoutDriver: 200,
    AdoptsWhatItSees: 0,
    GoesOnInAClosedIncarnation: 0,
    WaitsForever: 0,
    NeverDoubtsAWait: 0,
    JudgesTheSilent: 150,
}
"""With the life to begin the search at."""


@pytest.mark.parametrize("machine", PLANTED, ids=lambda machine: machine.__name__)
def test_a_planted_bug_is_found(machine: type[QuorumMachine]) -> None:
    with pytest.raises((Broken, AssertionError, KeyError)):
        collections.deque((live(seed, machine) for seed in range(PLANTED[machine], NUM_LIVES)), maxlen=0)


# --- Lives with one fault ---------------------------------------------------------------------------------------------


def _calm_world(num_groups: int = 3) -> World:
    world = World(0, sizes=(1,) * num_groups)
    assert world.run_until(20.0, world.is_well)
    return world


def test_a_hang_is_excluded_within_the_lease_and_comes_back_with_the_others_state() -> None:
    world = _calm_world()
    stopped = world.workers[WorkerId(1, 0)]
    stopped_at = world.now
    world.stop(stopped, 4.0)
    machine = world.hosts[-1].machine
    assert world.run_until(20.0, lambda: machine.is_active and machine.current is not None and stopped.one not in machine.current.workers)
    assert world.now - stopped_at < RULES.lease_s + 0.7
    assert world.run_until(world.now + 8.0, world.is_well)
    assert stopped.quorum is not None
    assert stopped.one in stopped.quorum.behind
    assert world.events["Kill"] == 0


def test_a_stuck_main_thread_is_found_and_a_long_evaluation_is_not() -> None:
    world = _calm_world()
    world.evaluate_ticks = 60
    world.run_until(world.now + 60.0)
    assert world.events["Kill"] == 0
    world.evaluate_ticks = 2
    assert world.run_until(world.now + 40.0, lambda: world.workers[WorkerId(2, 0)].phase == "step")
    world.hang(world.workers[WorkerId(2, 0)], None)
    assert world.run_until(world.now + RULES.unlearned_s + 4.0, lambda: world.workers[WorkerId(2, 0)].is_dead)
    assert world.run_until(world.now + 10.0, world.is_well)


def test_a_killed_worker_costs_no_lease() -> None:
    world = _calm_world()
    world.evaluate_ticks = 0
    world.run_until(world.now + 3.0)
    before, killed_at = world.properties.steps[-1][2], world.now
    world.ends(world.workers[WorkerId(1, 0)])
    assert world.run_until(killed_at + 10.0, lambda: world.properties.steps[-1][2] > before)
    assert world.now - killed_at < RULES.lease_s


# --- Examples ---------------------------------------------------------------------------------------------------------

A, B, C = (WorkerId(group, 0) for group in range(3))


class Desk:
    """A machine, the driver at its side, and what its workers say next. Time passes in steps of 0.1 s."""

    def __init__(self, min_groups: int = 1, committed: int = 0, base_step: int = 0, epoch: int = 0) -> None:
        self.now = 100.0
        claimed = Claimed(1, "base" if base_step else None, base_step)
        self.machine = QuorumMachine(RULES, min_groups, claimed, committed, self.now, epoch)
        self.told: dict[WorkerId, Directive] = {}
        self._reports: dict[WorkerId, Report] = {}
        self.event(DriverSeen(self.now))

    def event(self, event: Event) -> list[Decision]:
        return self.machine.handle(event, self.now)

    def hear(self, one: WorkerId, **values: Any) -> list[Decision]:
        """The next report of this worker: its last one with these values."""
        last = self._reports.get(one, Report(one, 0, 1, str(one), phase="wait"))
        report = self._reports[one] = replace(last, sequence=last.sequence + 1, **values)
        decisions = self.event(Reported(report))
        self.told[one] = self.machine.directive(report, self.now)
        return decisions

    def enter(self, *ones: WorkerId, step: int) -> None:
        for one in ones:
            self.hear(one)
            assert self.hear(one, phase="step", is_active=True, quorum=self.told[one].quorum, step=step, digest=str(step)) == []

    def leave(self, one: WorkerId, **values: Any) -> list[Decision]:
        return self.hear(one, phase="wait", is_active=False, **values)

    def wait(self, duration_s: float, *beating: WorkerId) -> list[Decision]:
        decisions: list[Decision] = []
        for _ in range(round(duration_s * 10)):
            self.now += 0.1
            decisions += self.event(DriverSeen(self.now))
            for one in beating:
                decisions += self.hear(one)
        return decisions

    def formed(self, decisions: list[Decision]) -> Quorum:
        (formed,) = (decision for decision in decisions if isinstance(decision, Formed))
        return formed.quorum


def _running(*ones: WorkerId, step: int = 5, **values: Any) -> Desk:
    """A quorum of these workers that has come to this step."""
    desk = Desk(min_groups=len(ones), **values)
    for one in ones:
        decisions = desk.hear(one)
    assert desk.formed(decisions).workers == ones
    desk.enter(*ones, step=step)
    desk.machine._min_groups = 1
    return desk


def _number(count: int, epoch: int = 0) -> Number:
    return Number(epoch, count)


def test_the_first_quorum_waits_for_the_least_number_of_whole_groups() -> None:
    desk = Desk(min_groups=2)
    assert desk.hear(A, group_size=2) == []
    assert desk.hear(B) == []
    decisions = desk.hear(WorkerId(0, 1), group_size=2)
    workers = (A, WorkerId(0, 1), B)
    assert decisions == [Formed(Quorum(_number(1), workers, str(A), 0, None, (), 1, None, from_base=True))]
    assert not desk.told[A].is_leased
    assert desk.hear(A) == []
    assert desk.told[A].is_leased


def test_a_base_is_read_by_one_and_handed_to_the_others() -> None:
    desk = Desk(min_groups=2, base_step=40, committed=40)
    desk.hear(A)
    quorum = desk.formed(desk.hear(B))
    assert (quorum.step, quorum.source, quorum.behind, quorum.base, quorum.from_base) == (40, A, (B,), "base", True)


def test_a_group_joins_at_a_step_boundary_and_takes_state() -> None:
    desk = _running(A)
    assert desk.hear(B) == []
    assert desk.told[B].quorum is None
    desk.hear(A, step=6, digest="6")
    assert desk.told[A].change
    over, formed = desk.leave(A, step=7, digest="7")
    assert over == Over(_number(1), "worker 0.0 left it at step 7")
    assert formed == Formed(Quorum(_number(2), (A, B), str(A), 7, A, (B,), 1, None, from_base=False))


def test_a_dead_worker_is_probed_and_costs_no_wait() -> None:
    desk = _running(A, B)
    left = desk.leave(A, broken="connection reset")
    assert left == [Over(_number(1), "worker 0.0 left it at step 5 (connection reset)"), Probe(B, str(B))]
    assert desk.hear(A) == []
    assert desk.formed(desk.event(Refused(B))).workers == (A,)


def test_a_silent_worker_is_excluded_and_killed_later() -> None:
    desk = _running(A, B)
    assert desk.wait(1.9, A) == []
    decisions = desk.wait(0.3, A)
    assert decisions[:2] == [Over(_number(1), "worker 1.0 is silent"), Probe(A, str(A))]
    assert desk.formed(desk.leave(A)).workers == (A,)
    assert [one for one in desk.wait(RULES.kill_after_s, A) if isinstance(one, Kill)] == [Kill(B, "has said nothing for 6 s")]


def test_the_lease_of_a_silent_worker_is_waited_out() -> None:
    desk = _running(A, B)
    desk.wait(1.0, A, B)
    desk.leave(A)
    at = desk.now
    while not desk.machine.is_active:
        desk.wait(0.1, A)
    assert desk.now - at >= RULES.lease_s


def test_a_stuck_main_thread_is_excluded_and_killed() -> None:
    desk = _running(A, B)
    desk.hear(A, phase="exchange", progress=1)
    decisions = desk.wait(RULES.unlearned_s + 0.2, A, B)
    assert decisions[0] == Over(_number(1), "worker 1.0 is stuck in step")
    assert Kill(B, "has made no progress in step for 12 s") in decisions
    assert desk.leave(A) == []
    assert desk.formed(desk.wait(2.1, A)).workers == (A,)


def test_a_member_that_never_enters_is_excluded_for_good() -> None:
    desk = Desk(min_groups=2)
    desk.hear(A)
    desk.hear(B)
    desk.enter(A, step=0)
    decisions = desk.wait(RULES.enter_s + 0.3, A, B)
    assert decisions[0] == Over(_number(1), "worker 1.0 is stuck in wait")
    assert Kill(B, "has made no progress in wait for 4 s") in decisions


def test_a_released_group_leaves_at_a_step_boundary() -> None:
    desk = _running(A, B)
    assert desk.event(Release((1,))) == []
    desk.hear(A)
    assert desk.told[A].change
    desk.leave(B, step=6, digest="6")
    assert desk.told[B].leave
    assert desk.formed(desk.leave(A, step=6, digest="6")).workers == (A,)


def test_groups_that_all_leave_amid_a_long_step_meet_to_commit_what_they_hold() -> None:
    desk = _running(A, B, step=5)
    assert desk.event(Release((0, 1))) == []
    assert desk.wait(RULES.leave_s, A, B) == []
    assert desk.wait(0.3, A, B)[0] == Over(_number(1), "all of it is to go, and its step is long")
    desk.leave(A)
    assert not desk.told[A].leave
    assert desk.formed(desk.leave(B)).workers == (A, B)
    desk.hear(A)
    assert desk.told[A].commit
    desk.hear(A, phase="commit", is_active=True, quorum=desk.told[A].quorum, committed=Committed(1, 5))
    desk.leave(A, committed=Committed(1, 5))
    assert desk.told[A].leave


def test_a_run_that_is_to_stop_amid_a_long_step_meets_to_commit_what_it_holds() -> None:
    desk = _running(A, B, step=5)
    assert desk.event(StopAsked()) == []
    assert desk.wait(RULES.leave_s, A, B) == []
    assert desk.wait(0.3, A, B)[0] == Over(_number(1), "all of it is to go, and its step is long")
    desk.leave(A)
    assert desk.formed(desk.leave(B)).workers == (A, B)
    for one in (A, B):
        desk.hear(one)
        desk.hear(one, phase="step", is_active=True, quorum=desk.told[one].quorum)
        assert desk.told[one].stop
    assert desk.wait(3 * RULES.leave_s, A, B) == [], "once is enough"


def test_groups_that_all_leave_and_hold_nothing_new_go_at_once() -> None:
    desk = _running(A, step=5)
    desk.hear(A, committed=Committed(1, 5))
    desk.event(Release((0,)))
    desk.leave(A, committed=Committed(1, 5))
    assert desk.told[A].leave


def test_a_group_that_ended_gets_no_lease_and_is_not_waited_for_longer_than_its_last() -> None:
    desk = _running(A, B)
    assert desk.event(GroupEnded(1))[0] == Over(_number(1), "group 1 has ended")
    desk.hear(B)
    assert desk.told[B].leave
    assert not desk.told[B].is_leased
    desk.leave(A)
    assert desk.formed(desk.wait(2.1, A, B)).workers == (A,)


def test_an_incarnation_is_claimed_when_nobody_holds_what_was_committed() -> None:
    desk = _running(A, B, step=8)
    desk.hear(A, committed=Committed(1, 8))
    desk.event(GroupEnded(0))
    desk.event(Refused(A))
    assert desk.leave(B, step=7, digest="7") == [ClaimNeeded()]
    assert desk.hear(B) == []
    quorum = desk.formed(desk.event(Claimed(2, "base", 8)))
    assert (quorum.step, quorum.source, quorum.from_base, quorum.incarnation) == (8, B, True, 2)


def test_a_holder_that_is_silent_for_a_moment_is_waited_for() -> None:
    desk = _running(A, step=8)
    desk.hear(A, committed=Committed(1, 8))
    desk.wait(3.0, B)
    assert not desk.machine.is_active
    assert desk.hear(A) == [Probe(A, str(A))]
    assert desk.formed(desk.leave(A)).source == A


def test_a_claimed_incarnation_ends_the_quorum_of_the_one_before() -> None:
    desk = _running(A, step=8)
    assert desk.event(Claimed(2, "base", 4))[0] == Over(_number(1), "incarnation 2 was claimed")
    quorum = desk.formed(desk.leave(A))
    assert (quorum.step, quorum.incarnation) == (8, 2)


def _restarted(before: Desk, *ones: WorkerId) -> tuple[Desk, list[Decision]]:
    """A second machine, to which these workers of the first report."""
    desk = Desk(epoch=1)
    desk._reports = dict(before._reports)
    return desk, desk.wait((RULES.driver_lease_s + RULES.lease_s) * 1.01 + 0.1, *ones)


def test_a_restarted_machine_adopts_a_quorum_that_is_whole() -> None:
    before = _running(A, B)
    desk, decisions = _restarted(before, A, B)
    assert decisions == []
    assert desk.machine.current == before.machine.current
    desk.hear(A)
    assert desk.told[A].is_leased
    decisions = desk.leave(B)
    assert decisions[0] == Over(_number(1), "worker 1.0 left it at step 5")
    assert desk.formed(desk.leave(A)).number == _number(1, epoch=1)


def test_a_restarted_machine_leases_nobody_before_the_old_leases_have_run_out() -> None:
    before = _running(A, B)
    desk = Desk(epoch=1)
    desk._reports = dict(before._reports)
    desk.wait(RULES.driver_lease_s + RULES.lease_s, A, B)
    assert not desk.told[A].is_leased
    assert desk.machine.current is None


def test_a_restarted_machine_that_misses_a_member_waits_the_leases_out_and_forms_anew() -> None:
    before = _running(A, B)
    desk, decisions = _restarted(before, A)
    assert decisions == [Probe(A, str(A))]
    assert desk.told[A].over == _number(0, epoch=1)
    quorum = desk.formed(desk.leave(A))
    assert (quorum.number, quorum.workers, quorum.step) == (_number(1, epoch=1), (A,), 5)


def test_a_word_of_the_driver_that_was_long_under_way_grants_nothing() -> None:
    desk = _running(A)
    heard_at = desk.now
    for _ in range(40):
        desk.now += 0.1
        desk.event(Tick())
        desk.hear(A)
    desk.event(DriverSeen(heard_at))
    desk.hear(A)
    assert not desk.told[A].is_leased


def test_a_machine_that_was_held_up_itself_takes_nobody_for_silent() -> None:
    desk = _running(A)
    desk.now += 30.0
    assert desk.event(Tick()) == []
    assert desk.event(DriverSeen(desk.now)) == []
    assert desk.hear(A) == []


def test_reports_that_were_overtaken_change_nothing() -> None:
    desk = _running(A)
    old = replace(desk._reports[A], sequence=1, phase="wait", is_active=False)
    assert desk.event(Reported(old)) == []
    assert desk.machine.is_active


def test_workers_that_disagree_end_the_run() -> None:
    desk = _running(A, B)
    desk.leave(A, step=6, digest="6")
    (fatal,) = desk.leave(B, step=6, digest="six")
    assert isinstance(fatal, Fatal)
    assert "disagree on what step 6 computed" in fatal.message


def test_quorums_without_a_step_end_the_run() -> None:
    desk = Desk()
    desk.hear(A)
    for _ in range(RULES.max_futile):
        desk.hear(A)
        desk.hear(A, phase="connect", is_active=True, quorum=desk.told[A].quorum)
        decisions = desk.leave(A, broken="no route to host")
    assert [type(one) for one in decisions] == [Over, Fatal]
    assert "no route to host" in str(decisions[1])
