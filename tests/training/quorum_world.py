"""A world around the quorum machine: workers, network, driver, store and faults, as one seeded simulation of discrete events.

One seed is one life, the same each time. Every process has a clock of its own, which may run 0.4 % fast or slow. A message may be
late, lost, doubled or overtaken (between workers and a machine) or held up for as long as the way is cut (between driver and
machine). A process may be killed (its peers notice, or not: a lost node), stopped and continued where it was, or cut off; the main
thread alone may hang. A machine may die, stop, or be cut off from the driver, which then starts the next one while it lives on.

`World.run` raises `Broken` with the name of the first property that does not hold; the properties stand in test_quorum.py. What
happens is shown to the properties as it happens.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from tests.training.quorum_properties import Broken, Properties
from tests.training.quorum_worker import Meeting, Process, State, Worker
from tidepool.training.membership import Committed, Number, Quorum, Report, WorkerId
from tidepool.training.quorum import QuorumMachine, Rules
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
    Probe,
    Refused,
    Release,
    Reported,
    Tick,
)

RULES = Rules(lease_s=2.0, driver_lease_s=3.0, kill_after_s=4.0, enter_s=4.0, unlearned_s=12.0, least_s=3.0, max_futile=30)
TICK_S = 0.1

Fault = Literal[
    "kill",
    "lose",
    "stop",
    "hang",
    "hang there",
    "cut",
    "machine dies",
    "machine stops",
    "machine is cut off",
    "release",
    "release all",
    "join",
    "false end",
    "noise",
    "wipe",
    "claim",
]
FAULTS: tuple[Fault, ...] = Fault.__args__  # type: ignore[attr-defined]


class Host(Process):
    """The process of one quorum machine."""

    def __init__(self, world: "World", epoch: int, make: "Make") -> None:
        super().__init__(world, f"machine {epoch}")
        self.epoch = epoch
        store = world.store
        claimed = Claimed(store.incarnation, store.base_name, store.base.step)
        self.machine = make(RULES, world.min_groups, claimed, store.newest.step, self.clock(), epoch)
        self.known = Committed(store.incarnation, store.newest.step)
        self.incarnation = store.incarnation
        self.heard: dict[WorkerId, Report] = {}
        self.arrived_at: dict[WorkerId, float] = {}
        self._arrived: dict[WorkerId, int] = {}
        self._current = self.machine.current
        self.after(TICK_S, self._tick)

    def _tick(self) -> None:
        self.handle(Tick())
        self.after(TICK_S, self._tick)

    def take(self, report: Report, worker: Worker) -> None:
        if report.sequence > self._arrived.get(report.worker, 0):
            self._arrived[report.worker] = report.sequence
            self.arrived_at[report.worker] = self.world.now
        self.act(lambda: self._take(report, worker), "main")

    def _take(self, report: Report, worker: Worker) -> None:
        before = self.heard.get(report.worker)
        if before is None or before.sequence < report.sequence:
            self.heard[report.worker] = report
        self.known = max(self.known, report.committed)
        self.handle(Reported(report))
        directive = self.machine.directive(report, self.clock())
        self.world.send(self, worker, lambda: worker.act(lambda: worker.answered(directive), "beat"))

    def handle(self, event: Event) -> None:
        if isinstance(event, Claimed):
            self.known = max(self.known, Committed(event.incarnation, event.base_step))
            self.incarnation = max(self.incarnation, event.incarnation)
        for decision in self.machine.handle(event, self.clock()):
            self.world.decided(self, decision)
        if self.machine.current is not self._current:
            self._current = self.machine.current
            self.world.properties.takes_effect(self._current)
        self.world.properties.handled(self)


Make = Callable[[Rules, int, Claimed, int, float, int], QuorumMachine]


class Store:
    """The log of commits and claims."""

    def __init__(self) -> None:
        self.incarnation, self.base = 1, State()
        self.base_name: str | None = None
        self._commits: dict[int, State] = {}

    @property
    def newest(self) -> State:
        return max((self.base, *self._commits.values()), key=lambda state: state.step)

    def commit(self, incarnation: int, state: State) -> bool:
        if incarnation == self.incarnation:
            self._commits[state.step] = state
        return incarnation == self.incarnation

    def claim(self, is_damaged: bool) -> Claimed:
        """The next incarnation, from the newest commit or, where that is damaged, the one before."""
        commits = sorted((self.base, *self._commits.values()), key=lambda state: state.step)
        self.base = commits[-2] if is_damaged and len(commits) > 1 else commits[-1]
        self.base_name = str(self.base.step) if self.base.step else None
        self.incarnation += 1
        self._commits = {}
        return Claimed(self.incarnation, self.base_name, self.base.step)


class World:
    """One life. `faults` are (when, what); after the last one the world is calm and must come to progress within `bound_s`."""

    def __init__(
        self, seed: int, make: Make = QuorumMachine, sizes: Sequence[int] = (1, 1, 1), min_groups: int = 1, noise: float = 0.0
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.min_groups, self.num_groups, self.sizes = min_groups, len(sizes), sizes
        self.noise = noise
        self.is_calm = False
        self.evaluate_ticks = 2
        self.num_shards = 1
        self.starts_from = 0.0
        """No group is started before this."""
        self.store = Store()
        self.hosts: list[Host] = []
        self.workers: dict[WorkerId, Worker] = {}
        self.meetings: dict[Number, Meeting] = {}
        self.groups: dict[int, list[Worker]] = {}
        self.ended: set[int] = set()
        self.leaving: set[int] = set()
        self.rules = RULES
        self.properties = Properties(self)
        self.events: Counter[str] = Counter()
        self.log: list[str] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._num_queued = 0
        self._wants_claim = False
        self._make = make
        self._start_host()
        for size in sizes:
            self.start_group(size)
        self.at(0.05, self._drive)

    # Time.

    def at(self, when: float, action: Callable[[], None]) -> None:
        self._num_queued += 1
        heapq.heappush(self._queue, (when, self._num_queued, action))

    def run_until(self, when: float, goal: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass until then, or the goal; returns whether it was met."""
        checked_at = self.now
        while self._queue and self._queue[0][0] <= when:
            self.now, _, action = heapq.heappop(self._queue)
            action()
            if self.now > checked_at + 0.2:
                checked_at = self.now
                if goal():
                    return True
        self.now = max(self.now, when)
        return goal()

    def note(self, text: str) -> None:
        self.log.append(f"{self.now:8.3f} {text}")

    # The network.

    def send(self, sender: Process, receiver: Process, deliver: Callable[[], None]) -> None:
        """Between a worker and a machine: late, lost, doubled, in any order."""
        if self._is_cut(sender, receiver) or self.random.random() < self.noise / 2:
            return
        self._deliver(sender, receiver, deliver, is_late=self.random.random() < self.noise)
        if self.random.random() < self.noise:
            self._deliver(sender, receiver, deliver, is_late=True)

    def _deliver(self, sender: Process, receiver: Process, deliver: Callable[[], None], is_late: bool) -> None:
        delay_s = self.random.choice((0.3, 1.0, 2.5, 5.0) if is_late else (0.0005, 0.001, 0.01))
        self.at(self.now + delay_s, lambda: None if self._is_cut(sender, receiver) else deliver())

    def _is_cut(self, one: Process, other: Process) -> bool:
        return any(end.is_dead or (end.is_cut and isinstance(end, Worker)) for end in (one, other))

    def call(self, host: Host, deliver: Callable[[], None]) -> None:
        """Between the driver and a machine: in the end it arrives, if the machine lives so long."""
        if host.is_dead:
            return
        if host.is_cut:
            self.at(self.now + 0.5, lambda: self.call(host, deliver))
        else:
            self.at(self.now + self.random.choice((0.001, 0.05)), deliver)

    # The driver.

    def _start_host(self) -> None:
        self.hosts.append(Host(self, len(self.hosts), self._make))
        host = self.hosts[-1]
        self.heard_at, self._answered_at = 0.0, self.now
        self._wants_claim = False
        for group in sorted(self.ended):
            self.tell(host, GroupEnded(group))
        if self.leaving:
            self.tell(host, Release(tuple(sorted(self.leaving))))
        for _ in range(2):
            self._see(host)
        for worker in self.workers.values():
            if self.random.random() < 0.7:
                worker.after(self.random.uniform(0.0, 8.0), lambda worker=worker: worker.finds(host), "beat")  # type: ignore[misc]

    def tell(self, host: Host, event: Event) -> None:
        self.call(host, lambda: host.act(lambda: host.handle(event), "main"))

    def _see(self, host: Host) -> None:
        def heard(clock: float) -> None:
            if host is self.hosts[-1]:
                self.heard_at, self._answered_at = max(self.heard_at, clock), self.now

        def seen(heard_at: float) -> None:
            host.handle(DriverSeen(heard_at))
            clock = host.clock()
            self.call(host, lambda: heard(clock))

        heard_at = self.heard_at
        self.call(host, lambda: host.act(lambda: seen(heard_at), "main"))

    def _drive(self) -> None:
        host = self.hosts[-1]
        if self.now - self._answered_at > (1.0 if host.is_dead else 4.0):
            self.note("the driver starts another machine")
            self._start_host()
        self._see(self.hosts[-1])
        for number, workers in list(self.groups.items()):
            if number not in self.ended and any(worker.is_dead for worker in workers):
                self._end_later(number, self.random.choice((0.0, 1.0, 1.0 if self.is_calm else 6.0)))
        living = [number for number in self.groups if number not in self.ended and number not in self.leaving]
        if len(living) < self.num_groups and self.now >= self.starts_from:
            self.start_group(self.sizes[len(self.groups) % len(self.sizes)])
        self.at(self.now + 1.0 / 2, self._drive)

    def start_group(self, size: int) -> int:
        number = len(self.groups)
        self.groups[number] = [Worker(self, WorkerId(number, rank), size) for rank in range(size)]
        self.workers |= {worker.one: worker for worker in self.groups[number]}
        return number

    def _end_later(self, number: int, delay_s: float) -> None:
        """The driver has noticed: it tells the machine, and ends what is left of the group now, or after a while."""
        self.ended.add(number)
        self.at(self.now + delay_s, lambda: self.tell(self.hosts[-1], GroupEnded(number)))
        for worker in self.groups[number]:
            self.at(self.now + delay_s + self.random.choice((0.0, 0.5, 3.0)), lambda worker=worker: self.ends(worker))  # type: ignore[misc]

    def decided(self, host: Host, decision: Decision) -> None:
        self.note(f"{host.name}: {decision}")
        self.events[type(decision).__name__] += 1
        is_newest = host is self.hosts[-1]
        match decision:
            case Formed(quorum):
                self.properties.formed(host, quorum)
            case Probe(one):
                worker = self.workers[one]
                if worker.is_dead and not worker.is_cut:
                    self.at(self.now + 0.01, lambda: host.act(lambda: host.handle(Refused(one)), "main"))
            case Kill(one):
                self.properties.killed(host, self.workers[one], RULES.lease_s)
                if is_newest:
                    self.call(host, lambda: self.ends(self.workers[one]))
            case ClaimNeeded():
                if is_newest and not self._wants_claim:
                    self._wants_claim = True
                    self.at(self.now + self.random.choice((0.1, 2.0)), self._claim)
            case Fatal(message):
                raise Broken("fatal", message)
            case _:
                pass

    def _claim(self) -> None:
        if self._wants_claim:
            self._wants_claim = False
            claimed = self.store.claim(is_damaged=self.random.random() < 0.3)
            self.note(str(claimed))
            self.tell(self.hosts[-1], claimed)

    # What befalls processes.

    def ends(self, worker: Worker, is_noticed: bool = True) -> None:
        """Its process dies; its peers notice at once, or never."""
        if worker.is_dead:
            return
        self.note(f"{worker.name} ends")
        worker.is_dead = True
        if not is_noticed:
            worker.is_cut = True
        elif worker.is_active and worker.quorum:
            self.lost(worker.one, worker.quorum.number)

    def lost(self, one: WorkerId, number: Number) -> None:
        """A member has left a quorum: who waits for it notices, unless the result is under way already and comes first."""
        meeting = self.meetings.get(number)
        if meeting is None:
            return
        meeting.gone.add(one)
        for peer in self.members(meeting.quorum):
            if peer.one != one and peer.quorum and peer.quorum.number == number and peer.is_active:
                peer.fail_after(self.random.choice((0.001, 0.005, 0.05)))

    def stop(self, process: Process, duration_s: float | None) -> None:
        if not process.is_dead and not process.is_stopped:
            self.note(f"{process.name} stops for {duration_s}")
            process.is_stopped = True
            if duration_s is not None:
                self.at(self.now + duration_s, lambda: self.continue_(process))

    def hang(self, worker: Worker, duration_s: float | None) -> None:
        if not worker.is_dead and not worker.is_hung:
            self.note(f"{worker.name} hangs in {worker.phase} for {duration_s}")
            worker.is_hung = True
            if duration_s is not None:
                self.at(self.now + duration_s, lambda: self.continue_(worker))

    def continue_(self, process: Process) -> None:
        self.note(f"{process.name} goes on")
        process.is_stopped = process.is_hung = False
        if isinstance(process, Worker):
            process.unhindered_since = self.now
        process.go_on()

    def members(self, quorum: Quorum) -> list[Worker]:
        return [self.workers[one] for one in quorum.workers]

    def strike(self, fault: Fault) -> None:
        """One fault of this kind, on whom it happens to hit."""
        pick = self.random
        living = [worker for worker in self.workers.values() if not worker.is_dead] or list(self.workers.values())
        worker = pick.choice(living)
        short_s, long_s = pick.choice((0.3, 1.0, 1.9)), pick.choice((2.2, 3.0, 5.0))
        match fault:
            case "kill" | "lose":
                self.ends(worker, is_noticed=fault == "kill")
            case "stop":
                self.stop(worker, pick.choice((short_s, long_s, long_s, 20.0)))
            case "hang":
                self.hang(worker, pick.choice((short_s, long_s, None)))
            case "hang there":
                worker.hangs_in = pick.choice(("wait", "connect", "transfer", "step", "exchange", "commit", "evaluate"))
            case "cut":
                self._cut(worker, pick.choice((short_s, long_s)))
            case "wipe":
                for one in living:
                    if not one.is_stopped and pick.random() < 0.8:
                        self.ends(one)
            case "machine dies":
                self.note(f"{self.hosts[-1].name} dies")
                self.hosts[-1].is_dead = True
            case "machine stops":
                self.stop(self.hosts[-1], pick.choice((short_s, long_s, 7.0)))
            case "machine is cut off":
                self._cut_off(self.hosts[-1], pick.choice((long_s, 6.0, 12.0)))
            case _:
                self._interfere(fault, worker.one.group)

    def _interfere(self, fault: Fault, number: int) -> None:
        """What the driver or the network does."""
        match fault:
            case "release":
                self._release()
            case "release all":
                self.release_all(self.random.choice((2.0, 6.0)))
            case "join" if len(self.groups) - len(self.ended) < self.num_groups + 2:
                self.start_group(self.random.choice((1, 2)))
            case "false end" if number not in self.ended:
                self.note(f"group {number} is said to have ended")
                self._end_later(number, 0.0)
            case "noise":
                self.noise = self.random.choice((0.1, 0.3))
                self.at(self.now + 4.0, self._quieten)
            case "claim" if self.store.incarnation < 4:
                self._wants_claim = True
                self._claim()

    def _quieten(self) -> None:
        self.noise = 0.0

    def _cut(self, worker: Worker, duration_s: float) -> None:
        """Its reports and their answers get lost for a while; its peers it reaches."""
        if worker.is_dead:
            return
        self.note(f"{worker.name} is cut for {duration_s}")
        worker.is_cut = True

        def mend() -> None:
            if not worker.is_dead:
                worker.is_cut = False
                worker.unhindered_since = self.now

        self.at(self.now + duration_s, mend)

    def _cut_off(self, host: Host, duration_s: float) -> None:
        """The driver and the machine do not reach each other; what they say arrives afterwards. Then the machine is found, and ended."""
        self.note(f"{host.name} is cut off for {duration_s}")
        host.is_cut = True

        def mend() -> None:
            host.is_cut = False

        def end() -> None:
            if host is not self.hosts[-1]:
                host.is_dead = True

        self.at(self.now + duration_s, mend)
        self.at(self.now + duration_s + 4.0, end)

    def _release(self) -> None:
        living = [number for number in self.groups if number not in self.ended | self.leaving]
        if living:
            number = self.random.choice(living)
            self.note(f"group {number} is released")
            self.leaving.add(number)
            self.tell(self.hosts[-1], Release((number,)))

    def release_all(self, pause_s: float) -> None:
        """The run is paused."""
        self.note("all groups are released")
        self.starts_from = self.now + pause_s
        self.leaving |= set(self.groups) - self.ended
        self.tell(self.hosts[-1], Release(tuple(sorted(self.leaving))))

    def calm_down(self) -> None:
        """No more faults. Old machines end; who is stopped for long is left to be found."""
        self.note("calm")
        self.noise, self.is_calm = 0.0, True
        for host in self.hosts:
            host.is_cut = False
            if host is not self.hosts[-1]:
                host.is_dead = True
            elif host.is_stopped:
                self.continue_(host)

    def is_well(self) -> bool:
        """Every group that is to be there is in a quorum that has taken some steps since all are in it."""
        machine = self.hosts[-1].machine
        if not machine.is_active or machine.current is None or self.hosts[-1].is_dead:
            return False
        wanted = {number for number in self.groups if number not in self.ended | self.leaving}
        members = {one.group for one in machine.current.workers}
        number, num_members = machine.current.number, len(machine.current.workers)
        done = Counter(one for _, one, of, _ in self.properties.steps[-8 * num_members :] if of == number)
        is_newest = machine.current.incarnation == self.store.incarnation
        return wanted == members and is_newest and all(done[one] >= 3 for one in machine.current.workers)


Theme = tuple[tuple[Fault, ...], tuple[float, ...]]
"""Faults that go together, and how noisy the network may be."""
THEMES: tuple[Theme, ...] = (
    (FAULTS, (0.0, 0.1)),
    (("machine is cut off", "machine is cut off", "machine dies", "machine stops", "stop", "kill"), (0.0, 0.0, 0.1)),
    (("hang", "hang there", "hang there", "kill", "join"), (0.0,)),
    (("wipe", "stop", "stop", "cut", "claim"), (0.0, 0.1)),
    (("stop", "kill", "release", "join", "release all"), (0.3, 0.5)),
    (("machine is cut off", "stop"), (0.0,)),
    (("wipe", "stop"), (0.0,)),
)
SIZES = ((1,), (1, 1), (1, 1, 1), (2, 1), (2, 2), (3, 1, 1), (1, 1, 1, 1))


def live(seed: int, make: Make = QuorumMachine) -> World:
    """One life of random faults, of a few kinds, then calm. Raises `Broken`."""
    pick = random.Random(seed)
    faults, noise = THEMES[seed % len(THEMES)]
    sizes = pick.choice(SIZES)
    world = World(seed, make, sizes, pick.randint(1, max(1, len(sizes) - 1)), pick.choice(noise))
    kinds = pick.sample(faults, min(len(faults), pick.randint(1, 4)))
    duration_s = pick.choice((8.0, 15.0, 25.0))
    for _ in range(int(duration_s / pick.choice((0.7, 2.0, 4.0)))):
        fault, when = pick.choice(kinds), pick.uniform(1.0, duration_s)
        world.at(when, lambda fault=fault: world.strike(fault))  # type: ignore[misc]
    try:
        world.run_until(duration_s)
        world.calm_down()
        if not world.run_until(duration_s + BOUND_S, world.is_well):
            raise Broken("progress")
    except Exception as broken:
        broken.add_note(f"seed {seed}\n" + "\n".join(world.log[-200:]))
        raise
    return world


BOUND_S = 70.0
"""The longest chain: a hang is found when what was never seen is overdue, its process is killed, another is started, loads and joins."""
