"""A pool as a discrete-event simulation: jobs, serving, the costs of starting, resizing and leaving, and the measures.

All schedulers live in the same world and pay the same constants, which are those measured on our training and on Ray
(shared facts: a worker group starts in about 10 s, survivors of a change go on within 1 s, a group leaves at the next step
boundary). A job that is paused commits first: it loses its start, not its work. That holds for the baselines, too.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pool_trace import TraceJob, Traffic

from tidepool.pool.speed import shard_speed

START_S = 10.0
"""From a grant until a worker group or a replica works."""
RESIZE_PAUSE_S = 1.0
"""How long a job stands still when workers join or leave."""
LEAVE_S = 2.0
"""From being asked until the GPU is free."""
SAMPLE_S = 1800.0


@dataclass(slots=True, eq=False)
class Job:
    """A training job in the world; `remaining_s` is work, in seconds at its own size."""

    trace: TraceJob
    remaining_s: float
    active: int = 0
    starting: int = 0
    leaving: int = 0
    speed: float = 0.0
    updated_s: float = 0.0
    version: int = 0
    finished_s: float | None = None
    blocked_until_s: float = 0.0

    @property
    def held(self) -> int:
        """GPUs that it holds and was not asked for."""
        return self.active + self.starting

    def speed_of(self, workers: int) -> float:
        """Relative to its own size; twice as many logical shards as GPUs."""
        shards = 2 * self.trace.size
        return shard_speed(workers, shards) / shard_speed(self.trace.size, shards) if workers else 0.0


@dataclass(slots=True, eq=False)
class Served:
    """A deployment in the world."""

    traffic: Traffic
    running: int = 0
    starting: int = 0
    draining: int = 0
    needed: int = 0
    wanted: int = 0

    @property
    def kept(self) -> int:
        """Replicas that stay."""
        return self.running + self.starting


class Scheduler(Protocol):
    """Who gets which GPUs. It is asked after everything that happens, but no more often than every `spacing_s`."""

    spacing_s: float

    def round(self, world: "World") -> None:
        """Start, resize and pause jobs and replicas."""
        ...


@dataclass
class Measures:
    """What is measured, over the time in which jobs arrive (completion times: over all jobs)."""

    jct_s: list[float] = field(default_factory=list)
    used_gpu_s: float = 0.0
    lost_gpu_s: float = 0.0
    in_slo_s: float = 0.0
    of_slo_s: float = 0.0
    preemptions: int = 0
    resizes: int = 0
    samples: list[tuple[float, float, float, int]] = field(default_factory=list)
    """Second, part of the GPUs that train, part that serves, jobs that wait."""


class World:
    """The pool while it lives. Schedulers use `start`, `shrink`, `start_replica` and what is readable here."""

    def __init__(self, num_gpus: int, jobs: list[TraceJob], traffic: list[Traffic], span_s: float, scheduler: Scheduler) -> None:
        self.num_gpus = num_gpus
        self.now_s = 0.0
        self.span_s = span_s
        self.jobs: dict[str, Job] = {}
        self.served = [Served(one) for one in traffic]
        self.free = num_gpus
        self.leaving = 0
        self.measures = Measures()
        self._scheduler = scheduler
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._round_at_s: float | None = None
        self._last_round_s = -1e9
        self._measured_s = 0.0
        self._training = 0
        self._idle_held = 0
        self._sums = [0.0, 0.0, 0.0]
        self.num_waiting = 0
        for job in jobs:
            self.at(job.arrival_s, lambda job=job: self._arrive(job))
        self.at(0.0, lambda: self._minute(0))

    # --- Time --------------------------------------------------------------------------------------------------------

    def run(self) -> Measures:
        """Until every job has finished."""
        while self._events:
            at_s, _, action = heapq.heappop(self._events)
            self._measure(at_s)
            self.now_s = at_s
            action()
            if not self.jobs and at_s > self.span_s:
                break
        assert not self.jobs
        return self.measures

    def at(self, second: float, action: Callable[[], None]) -> None:
        """Let something happen then."""
        heapq.heappush(self._events, (second, next(self._count), action))

    def wake(self) -> None:
        """Something changed: ask the scheduler, soon."""
        at_s = max(self.now_s, self._last_round_s + self._scheduler.spacing_s)
        if self._round_at_s is None:
            self._round_at_s = at_s
            self.at(at_s, self._round)

    def _round(self) -> None:
        self._round_at_s = None
        self._last_round_s = self.now_s
        self._scheduler.round(self)

    # --- Jobs --------------------------------------------------------------------------------------------------------

    def _arrive(self, trace: TraceJob) -> None:
        self.jobs[trace.name] = Job(trace, trace.duration_s, updated_s=self.now_s)
        self.num_waiting += 1
        self.wake()

    def start(self, job: Job, workers: int) -> None:
        """Grant GPUs to a job, which work after `START_S`."""
        if job.held == 0:
            self.num_waiting -= 1
        self.free -= workers
        assert self.free >= 0
        job.starting += workers
        self._idle_held += workers

        def begin() -> None:
            up = min(workers, job.starting)
            if job.finished_s is None and up:
                self._set(job, job.active + up, job.starting - up)

        self.at(self.now_s + START_S, begin)

    def shrink(self, job: Job, workers: int, gone: Callable[[], None] | None = None) -> None:
        """Ask a job for GPUs, those that are still starting first; they are free after `LEAVE_S`."""
        held = job.held
        from_starting = min(job.starting, workers)
        self._set(job, job.active - (workers - from_starting), job.starting - from_starting)
        job.leaving += workers
        self.leaving += workers
        self._idle_held += workers
        if held == workers:
            self.measures.preemptions += 1
            self.num_waiting += 1

        def leave() -> None:
            job.leaving -= workers
            self.leaving -= workers
            self._idle_held -= workers
            self.free += workers
            if gone is not None:
                gone()
            self.wake()

        self.at(self.now_s + LEAVE_S, leave)

    def _set(self, job: Job, active: int, starting: int) -> None:
        """Change how many workers compute, at the price of a pause if any did before and do after."""
        self._idle_held += starting - job.starting
        job.remaining_s -= job.speed * (self.now_s - job.updated_s)
        job.updated_s = self.now_s
        if active != job.active:
            self._training += active - job.active
            speed = job.speed_of(active)
            if job.active and active:
                self.measures.resizes += 1
                self.measures.lost_gpu_s += RESIZE_PAUSE_S * active
                job.remaining_s += RESIZE_PAUSE_S * speed
            job.speed = speed
            job.version += 1
            if speed:
                version = job.version
                self.at(self.now_s + max(0.0, job.remaining_s) / speed, lambda: self._finish(job, version))
        job.active, job.starting = active, starting

    def _finish(self, job: Job, version: int) -> None:
        if job.version != version:
            return
        self.free += job.active + job.starting
        self._training -= job.active
        self._idle_held -= job.starting
        job.active = job.starting = 0
        job.version += 1
        job.finished_s = self.now_s
        del self.jobs[job.trace.name]
        if not job.trace.is_rest:
            self.measures.jct_s.append(self.now_s - job.trace.arrival_s)
        self.wake()

    # --- Serving -----------------------------------------------------------------------------------------------------

    def _minute(self, minute: int) -> None:
        for served in self.served:
            last = min(minute, len(served.traffic.wanted) - 1)
            served.needed, served.wanted = served.traffic.needed[last], served.traffic.wanted[last]
            if served.kept > served.wanted:
                self._drain(served, served.kept - served.wanted)
        self.wake()
        if self.now_s < self.span_s or self.jobs:
            self.at(self.now_s + 60.0, lambda: self._minute(minute + 1))

    def start_replica(self, served: Served, count: int = 1) -> None:
        """Let replicas start."""
        self.free -= count
        assert self.free >= 0
        served.starting += count

        def up() -> None:
            ready = min(count, served.starting)
            served.starting -= ready
            served.running += ready

        self.at(self.now_s + START_S, up)

    def _drain(self, served: Served, count: int) -> None:
        from_starting = min(served.starting, count)
        served.starting -= from_starting
        served.running -= count - from_starting
        served.draining += count
        self.leaving += count

        def end() -> None:
            served.draining -= count
            self.leaving -= count
            self.free += count
            self.wake()

        self.at(self.now_s + LEAVE_S, end)

    # --- Measures ----------------------------------------------------------------------------------------------------

    def _measure(self, until_s: float) -> None:
        until_s = min(until_s, self.span_s)
        seconds = until_s - self._measured_s
        if seconds <= 0:
            return
        serving = sum(min(one.running, one.wanted) for one in self.served)
        measures = self.measures
        measures.used_gpu_s += seconds * (self._training + serving)
        measures.lost_gpu_s += seconds * self._idle_held
        measures.in_slo_s += seconds * sum(one.running >= one.needed for one in self.served)
        measures.of_slo_s += seconds * len(self.served)
        for position, value in enumerate((self._training, serving, self.num_waiting)):
            self._sums[position] += seconds * value
        if until_s // SAMPLE_S > self._measured_s // SAMPLE_S:
            training, served, waiting = (value / SAMPLE_S for value in self._sums)
            measures.samples.append((until_s, training / self.num_gpus, served / self.num_gpus, round(waiting)))
            self._sums = [0.0, 0.0, 0.0]
        self._measured_s = until_s
