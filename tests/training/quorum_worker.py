"""The simulated processes: a worker as member.py has it, with a heartbeat thread and a main thread, on a clock of its own.

What a step computes is modelled by a chain of digests, so that a step that starts from another state than it should is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tidepool.training.membership import NONE, Committed, Directive, Number, Quorum, Report, WorkerId

if TYPE_CHECKING:
    from tests.training.quorum_world import Host, World

BEAT_S, CALL_TIMEOUT_S = 0.2, 0.7
WITH_PEERS = ("connect", "transfer", "exchange")

Thread = Literal["main", "beat"]


@dataclass(frozen=True)
class State:
    """What a worker holds: `step` completed steps; the digest stands for all of it."""

    step: int = 0
    digest: int = 0

    @property
    def next(self) -> "State":
        return State(self.step + 1, hash((self.digest, self.step + 1)))


class Process:
    """Something that runs on a clock of its own, and can be dead or stopped. `hung` stops its main thread alone."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.is_dead = self.is_stopped = self.is_hung = False
        self.is_cut = False
        """Nobody learns anything from it, not even that it is dead."""
        self._rate = 1 + world.random.uniform(-0.004, 0.004)
        self._offset_s = world.random.uniform(1, 1000)
        self._held: list[tuple[Thread, Callable[[], None]]] = []

    def clock(self) -> float:
        return self._offset_s + self._rate * self.world.now

    def after(self, delay_s: float, action: Callable[[], None], thread: Thread = "main") -> None:
        """Do it then, or as soon as this process is able to."""
        self.world.at(self.world.now + delay_s, lambda: self.act(action, thread))

    def act(self, action: Callable[[], None], thread: Thread) -> None:
        if self.is_dead:
            return
        if self.is_stopped or (self.is_hung and thread == "main"):
            self._held.append((thread, action))
        else:
            action()

    def go_on(self) -> None:
        held, self._held = self._held, []
        for thread, action in held:
            self.act(action, thread)


@dataclass
class Meeting:
    """The workers of one quorum, connected: rounds of contributions."""

    quorum: Quorum
    arrived: set[WorkerId] = field(default_factory=set)
    gone: set[WorkerId] = field(default_factory=set)
    received: set[WorkerId] = field(default_factory=set)
    rounds: dict[int, dict[WorkerId, tuple[State, bool, bool]]] = field(default_factory=dict)


class Worker(Process):
    """One worker's process: a heartbeat thread that talks to a machine, and a main thread that enters quorums and takes steps."""

    def __init__(self, world: "World", one: WorkerId, group_size: int) -> None:
        super().__init__(world, str(one))
        self.one, self.group_size = one, group_size
        self.host = world.hosts[-1]
        self.state: State | None = None
        self.phase, self.progress = "load", 0
        self.quorum: Quorum | None = None
        self.is_active = self.is_torn = self.must_leave = False
        self.over = NONE
        self.offered: Quorum | None = None
        self.lease_until = float("-inf")
        self.change = self.commit = False
        self.committed = Committed(0, 0)
        self.broken = ""
        self.round = 0
        self.slowest_s: dict[str, float] = {}
        self.hangs_in = ""
        self.unhindered_since = world.now
        self._epoch = 0
        self._sequence = self._processed = 0
        self._sent: dict[int, float] = {}
        self._is_calling = self._is_dirty = False
        self._has_result = self._changes = self._commits = self._is_going = False
        self._ticket = 0
        """Grows with all that the main thread waits for: what comes for an older ticket comes too late."""
        self._since = world.now
        self.after(world.random.uniform(0, BEAT_S), self._beat, "beat")
        self.after(world.random.choice((0.1, 1.0, 3.0)), self._wait)

    # The heartbeat thread.

    def _beat(self) -> None:
        self.report()
        self.after(BEAT_S, self._beat, "beat")

    def report(self) -> None:
        if self._is_calling:
            self._is_dirty = True
            return
        self._sequence += 1
        self._is_calling, self._is_dirty = True, False
        self._sent[self._sequence] = self.clock()
        report = Report(
            worker=self.one,
            sequence=self._sequence,
            group_size=self.group_size,
            address=self.name,
            phase=self.phase,
            progress=self.progress,
            quorum=self.quorum,
            is_active=self.is_active,
            step=self.state.step if self.state and not self.is_torn else None,
            digest=str(self.state.digest) if self.state and not self.is_torn else "",
            committed=self.committed,
            over=self.over,
            broken=self.broken,
            slowest_s=dict(self.slowest_s),
        )
        sequence, host = self._sequence, self.host
        self.world.send(self, host, lambda: host.take(report, self))
        self.after(CALL_TIMEOUT_S, lambda: self._give_up(sequence), "beat")

    def _give_up(self, sequence: int) -> None:
        if self._is_calling and sequence == self._sequence:
            self._is_calling = False
            living = [host for host in self.world.hosts if not host.is_dead]
            self.host = self.world.random.choice([*living, self.world.hosts[-1]])
            if self._is_dirty:
                self.report()

    def finds(self, host: "Host") -> None:
        """It hears of a newer machine, though the older one may answer still."""
        self.host = host

    def answered(self, directive: Directive) -> None:
        if directive.sequence == self._sequence:
            self._is_calling = False
        if directive.epoch >= self._epoch and directive.sequence > self._processed:
            self._epoch, self._processed = directive.epoch, directive.sequence
            self.over = max(self.over, directive.over)
            if directive.is_leased:
                self.lease_until = max(self.lease_until, self._sent[directive.sequence] + self.world.rules.lease_s)
            self.offered, self.change, self.commit = directive.quorum, directive.change, directive.commit
            self.must_leave = self.must_leave or directive.leave
            self.committed = max(self.committed, directive.committed)
            self.world.properties.stepper(self)
            self.after(self.world.random.choice((0.0, 0.005, 0.02)), self._look)
        if self._is_dirty and not self._is_calling:
            self.report()

    # The main thread.

    @property
    def is_leased(self) -> bool:
        return self.clock() < self.lease_until

    def may_step_in(self) -> Quorum | None:
        """The quorum that it may complete a step in without a further word, if there is one."""
        if self.is_dead or not self.is_leased:
            return None
        if self.is_active:
            return self.quorum if self.quorum and self.quorum.number > self.over else None
        return self.offered if self._is_offered() else None

    def _is_offered(self) -> bool:
        entered = self.quorum.number if self.quorum else NONE
        return self.offered is not None and self.offered.number > max(self.over, entered)

    def _move(self, phase: str) -> None:
        took_s = self.world.now - self._since
        if self.phase not in ("wait", "load"):
            self.slowest_s[self.phase] = max(took_s, self.slowest_s.get(self.phase, 0.0))
        self.phase, self._since = phase, self.world.now
        self._tick()
        if phase == self.hangs_in:
            self.hangs_in = ""
            self.world.at(self.world.now, lambda: self.world.hang(self, None))

    def _tick(self) -> None:
        self.progress += 1
        self._ticket += 1
        self.report()

    def _wait(self) -> None:
        self._move("wait")
        self._look()

    def _look(self) -> None:
        """What it does between two things, and in slices while it waits: see what the heartbeat thread has heard."""
        if self.phase == "wait":
            if self.must_leave:
                self.world.ends(self, is_noticed=True)
            elif self._is_offered():
                self._enter()
        elif self.phase in WITH_PEERS and self.quorum and (self.over >= self.quorum.number or self.must_leave):
            self._leave("it is over, or goes on without this worker")
        elif self.phase == "exchange" and self._has_result and self.is_leased:
            self._apply()

    def _enter(self) -> None:
        assert self.offered is not None
        self.quorum, self.is_active, self.broken = self.offered, True, ""
        self.round, self._has_result, self._is_going = 0, False, False
        self._move("connect")
        self.world.properties.entered(self)
        ticket = self._ticket
        self.after(self.world.random.choice((0.01, 0.1)), lambda: self._connect(ticket))

    def _leave(self, broken: str) -> None:
        assert self.quorum is not None
        self.broken = broken
        self.is_active = self.is_torn = False
        self._move("wait")
        self.world.lost(self.one, self.quorum.number)
        self._look()

    def _fails(self, ticket: int) -> None:
        if ticket == self._ticket and self.is_active:
            self._leave("a peer is lost")

    def fail_after(self, delay_s: float) -> None:
        """A connection breaks that it waits on, or will wait on."""
        ticket = self._ticket
        if self.phase in WITH_PEERS:
            self.after(delay_s, lambda: self._fails(ticket))

    def _meeting(self) -> Meeting:
        assert self.quorum is not None
        return self.world.meetings.setdefault(self.quorum.number, Meeting(self.quorum))

    def _connect(self, ticket: int) -> None:
        if ticket != self._ticket:
            return
        meeting = self._meeting()
        meeting.arrived.add(self.one)
        if meeting.gone:
            self.fail_after(0.01)
        elif len(meeting.arrived) == len(meeting.quorum.workers):
            for peer in self.world.members(meeting.quorum):
                peer.after(self.world.random.choice((0.001, 0.02)), peer.connected(meeting.quorum.number))

    def connected(self, number: Number) -> Callable[[], None]:
        def proceed() -> None:
            if self.quorum is None or self.quorum.number != number or self.phase != "connect":
                return
            quorum = self.quorum
            if quorum.from_base and quorum.source is None:
                self.state = State()
                self._begin()
            elif self.one == quorum.source or self.one in quorum.behind:
                self._transfer(quorum)
            else:
                self._begin()

        return proceed

    def _transfer(self, quorum: Quorum) -> None:
        self.is_torn = self.one in quorum.behind or quorum.from_base
        self._move("transfer")
        ticket, delay_s = self._ticket, self.world.random.choice((0.05, 0.5))
        if self.one == quorum.source:
            self.after(delay_s, lambda: self._hand_on(quorum, ticket))
        elif self._meeting().gone:
            self.fail_after(0.01)

    def _hand_on(self, quorum: Quorum, ticket: int) -> None:
        if ticket != self._ticket:
            return
        if quorum.from_base:
            self.state, self.is_torn = self.world.store.base, False
        assert self.state is not None
        state = self.state
        for peer in self.world.members(quorum):
            if peer.one in quorum.behind:
                peer.after(self.world.random.choice((0.001, 0.05)), peer.receive(quorum.number, state))
        self._begin()

    def receive(self, number: Number, state: State) -> Callable[[], None]:
        def proceed() -> None:
            if self.quorum is None or self.quorum.number != number or not self.is_active:
                return
            if self.phase == "connect":  # it comes before it has noticed that all are there
                self.after(0.03, self.receive(number, state))
            elif self.phase == "transfer":
                self.state, self.is_torn = state, False
                self._begin()

        return proceed

    def _begin(self) -> None:
        """What a quorum that is to commit and go says in its first exchange is the same for all: it came with the quorum."""
        if self.commit:
            self._go_home()
        else:
            self._compute()

    def _compute(self) -> None:
        self._move("step")
        self._compute_shard(self.world.random.choice((0.1, 0.15, 0.3)), self.world.num_shards)

    def _compute_shard(self, duration_s: float, left: int) -> None:
        ticket = self._ticket
        self.after(duration_s, lambda: self._computed(ticket, duration_s, left - 1))

    def _computed(self, ticket: int, duration_s: float, left: int) -> None:
        """Between two shards, and before the exchange, it looks whether to go on."""
        assert self.quorum is not None
        if ticket != self._ticket:
            return
        if self.over >= self.quorum.number or self.must_leave:
            self._leave("it is over, or goes on without this worker")
        elif left:
            self._tick()
            self._compute_shard(duration_s, left)
        else:
            self._exchange()

    def _exchange(self) -> None:
        assert self.quorum is not None
        assert self.state is not None
        self._has_result = False
        self._move("exchange")
        meeting = self._meeting()
        given = meeting.rounds.setdefault(self.round, {})
        given[self.one] = (self.state, self.change, self.commit)
        if meeting.gone and len(given) < len(self.quorum.workers):
            self.fail_after(0.01)
        elif len(given) == len(self.quorum.workers):
            self.world.properties.round(meeting, self.round)
            change, commit = (any(one[wish] for one in given.values()) for wish in (1, 2))
            for peer in self.world.members(self.quorum):
                ticket = peer._ticket
                peer.after(self.world.random.choice((0.001, 0.01, 0.05)), peer.result(ticket, change, commit))

    def result(self, ticket: int, change: bool, commit: bool) -> Callable[[], None]:
        def proceed() -> None:
            if ticket == self._ticket and self.phase == "exchange" and not self._is_going:
                self._has_result, self._changes, self._commits = True, change, commit
                self._ticket += 1  # nothing that a peer does matters any more
                self._look()

        return proceed

    def _apply(self) -> None:
        """The check is done: the step counts from here on, though the state is torn for a while."""
        assert self.quorum is not None
        assert self.state is not None
        self.state, self.is_torn = self.state.next, True
        self.round += 1
        self._has_result = False
        self.world.properties.step(self, self.quorum, self.state)
        self._move("step")
        self.after(self.world.random.choice((0.0, 0.0, 0.03)), self._applied)

    def _applied(self) -> None:
        assert self.quorum is not None
        assert self.state is not None
        self.is_torn = False
        if self.one == self.quorum.workers[0] and self.state.step % 4 == 0:
            self._move("commit")
            state, incarnation = self.state, self.quorum.incarnation
            self.after(0.2, lambda: self._commit(state, incarnation))
        elif self.state.step % 7 == 0:
            self._move("evaluate")
            self.after(0.5, lambda: self._evaluate(self.world.evaluate_ticks))
        else:
            self._next()

    def _evaluate(self, left: int) -> None:
        if left > 0:
            self._tick()
            self.after(0.5, lambda: self._evaluate(left - 1))
        else:
            self._next()

    def _commit(self, state: State, incarnation: int) -> None:
        if self.world.store.commit(incarnation, state):
            self.after(0.05, lambda: self._know(Committed(incarnation, state.step)))
        else:
            self._leave("another incarnation is claimed")

    def _know(self, committed: Committed) -> None:
        self.committed = max(self.committed, committed)
        self._next()

    def _next(self) -> None:
        if self._changes and self._commits:
            self._go_home()
        elif self._changes:
            self._leave("")
        else:
            self._compute()

    def _go_home(self) -> None:
        """Nobody leaves before the last commit stands."""
        assert self.quorum is not None
        assert self.state is not None
        self._is_going = True
        if self.one != self.quorum.workers[0]:
            self._move("exchange")
            if self._meeting().gone:
                self.fail_after(0.01)
            return
        self._move("commit")
        quorum, state, ticket = self.quorum, self.state, self._ticket
        self.after(0.2, lambda: self._commit_last(quorum, state, ticket))

    def _commit_last(self, quorum: Quorum, state: State, ticket: int) -> None:
        if ticket != self._ticket:
            return
        if self.world.store.commit(quorum.incarnation, state):
            self.committed = max(self.committed, Committed(quorum.incarnation, state.step))
            for peer in self.world.members(quorum):
                if peer.one != self.one:
                    peer.after(0.01, peer.goes(quorum.number))
        self._leave("")

    def goes(self, number: Number) -> Callable[[], None]:
        def proceed() -> None:
            if self.quorum is not None and self.quorum.number == number and self.phase == "exchange" and self._is_going:
                self._ticket += 1
                self._leave("")

        return proceed
