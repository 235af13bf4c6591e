"""What must hold in every simulated life, looked at from outside at every event: see test_quorum.py for the list."""

from typing import TYPE_CHECKING

from tests.training.quorum_worker import Meeting, State, Worker
from tidepool.training.membership import NONE, Committed, Number, Quorum, WorkerId

if TYPE_CHECKING:
    from tests.training.quorum_world import Host, World

SLACK_S = 1.0
"""What a message, and whoever acts on it, may take in a calm network."""


class Broken(Exception):
    """A property does not hold. The first argument is its name."""

    @property
    def name(self) -> str:
        return str(self.args[0])


class Properties:
    """Raises `Broken`."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._digests: dict[int, int] = {}
        self._highest = NONE
        self._effective: Quorum | None = None
        self.num_barren = 0
        """So many quorums were formed since a step was completed."""
        self.steps: list[tuple[float, WorkerId, Number, int]] = []
        """Who completed which step, when, in which quorum."""

    def formed(self, host: "Host", quorum: Quorum) -> None:
        self.num_barren += 1
        if quorum.number <= self._highest:
            raise Broken("numbers", quorum, self._highest)
        self._highest = quorum.number
        for number in {one.group for one in quorum.workers}:
            if [one for one in quorum.workers if one.group == number] != [worker.one for worker in self._world.groups[number]]:
                raise Broken("whole groups", quorum)
        is_last = all(one.group in self._world.leaving for one in quorum.workers)
        if len({one.group for one in quorum.workers}) < self._world.min_groups and not is_last:
            raise Broken("min groups", quorum)
        if Committed(quorum.incarnation, quorum.step) < host.known:
            raise Broken("below the commit", quorum, host.known)
        heard = [host.heard[one] for one in quorum.workers]
        steps = {report.worker: report.step for report in heard}
        if not all(report.is_ready for report in heard):
            raise Broken("not ready", quorum, heard)
        if any(step is not None and step > quorum.step for step in steps.values()):
            raise Broken("highest step", quorum, steps)
        if not quorum.from_base and (quorum.source is None or steps[quorum.source] != quorum.step):
            raise Broken("source", quorum, steps)
        if not quorum.from_base and {one for one, step in steps.items() if step != quorum.step} != set(quorum.behind):
            raise Broken("behind", quorum, steps)

    def takes_effect(self, quorum: Quorum | None) -> None:
        self._effective = quorum
        for worker in self._world.workers.values():
            self.stepper(worker)

    def stepper(self, worker: Worker) -> None:
        quorum = worker.may_step_in()
        if quorum is not None and quorum != self._effective:
            raise Broken("two quorums", worker.name, quorum, self._effective)

    def entered(self, worker: Worker) -> None:
        self.stepper(worker)
        quorum = worker.quorum
        assert quorum is not None
        takes = worker.one in quorum.behind or quorum.from_base
        if not takes and (worker.state is None or worker.is_torn or worker.state.step != quorum.step):
            raise Broken("source", worker.name, worker.state, quorum)

    def round(self, meeting: Meeting, number: int) -> None:
        states = {state for state, _, _ in meeting.rounds[number].values()}
        if len(states) != 1 or next(iter(states)).step != meeting.quorum.step + number:
            raise Broken("one history", meeting.quorum, number, states)

    def step(self, worker: Worker, quorum: Quorum, state: State) -> None:
        if quorum != self._effective:
            raise Broken("two quorums", worker.name, quorum, self._effective)
        if self._digests.setdefault(state.step, state.digest) != state.digest or state.step != quorum.step + worker.round:
            raise Broken("one history", worker.name, state, quorum)
        self.num_barren = 0
        self.steps.append((self._world.now, worker.one, quorum.number, state.step))

    def killed(self, host: "Host", worker: Worker, lease_s: float) -> None:
        """Nobody whose reports arrive and whose main thread moves is killed, unless it goes on since this very moment only."""
        is_hindered = worker.is_dead or worker.is_hung or worker.is_stopped or worker.is_cut
        if is_hindered or self._world.now - worker.unhindered_since <= SLACK_S or host is not self._world.hosts[-1]:
            return
        if self._world.now - host.arrived_at.get(worker.one, 0.0) < lease_s:
            raise Broken("killed", worker.name, worker.phase)

    def handled(self, host: "Host") -> None:
        """A quorum of an incarnation that is known to be closed does not go on."""
        machine = host.machine
        if machine.is_active and machine.current is not None and machine.current.incarnation < host.incarnation:
            raise Broken("incarnation", machine.current, host.incarnation)
