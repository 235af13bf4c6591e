"""The two sides of `pool_live`: a run and a service on the four slots of a cluster of this machine, watched while traffic rises and falls.

Both have the same service (`tidepool.serving`). Beside it trains, on ours, a run of Tidepool's, and the arbiter says who gets a slot; on
the other, Ray Train's elastic trainer, and nobody does: a replica starts when Ray has room for it.
"""

import asyncio
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.util
from chaos import Run
from http_load import Answered, complete
from pool_live_events import Sample
from ray.exceptions import RayError
from recovery_cluster import end
from recovery_sides import is_alive
from recovery_timeline import Timeline

from tidepool.errors import TidepoolError
from tidepool.local_cluster import LocalCluster
from tidepool.messages import ARBITER, NAMESPACE, ClusterView, Stop
from tidepool.pool.cluster import read_cluster

ROOT = Path(__file__).resolve().parents[1]
NUM_SLOTS, MAX_REPLICAS = 4, 3
MODELS = ("base", "bot@1", "bot@2")
NUM_TOKENS = 96
_LOOK_EVERY_S = 0.1
_READY_TIMEOUT_S = 300.0
_STOCK_PATIENCE_S = 120.0
"""How long the other side may take to its first step before traffic begins all the same."""
_ASK_TIMEOUT_S = 30.0
_REQUEST_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Phase:
    """So long, with so many requests a second."""

    name: str
    seconds: float
    per_s: float


@dataclass
class Played:
    """What happened on a side: times of samples and of `bounds` (of the phases) are seconds from the first one's beginning."""

    samples: list[Sample]
    answers: list[tuple[int, Answered]]
    """Each with the number of its phase."""
    bounds: list[float]
    num_steps: list[int]
    """Steps that were completed in each phase."""
    num_repeated: int
    """Steps that were completed more than once."""


class Training(Protocol):
    """Training on a side; `timeline` has its steps."""

    name: str
    timeline: Timeline

    def start(self) -> None:
        """Start it; returns once it takes steps, with all that it can have, or after long enough."""
        ...

    def num_wanted(self, view: ClusterView) -> int:
        """How many replicas serving wants here."""
        ...

    def progress(self) -> tuple[int, int]:
        """How many workers take steps together, and the newest step."""
        ...

    def stop(self) -> None:
        """End it; nothing is left of it in the cluster."""
        ...


class Ours:
    """A run in the pool."""

    name = "Tidepool"

    def __init__(self, cluster: LocalCluster, run: Run) -> None:
        self.run, self.timeline = run, Timeline(lambda: _logs(cluster))
        self._seen = 0, 0

    def start(self) -> None:
        self.run.submit()
        self.run.wait(lambda status: status["is_stepping"] and len(status["groups"]) == NUM_SLOTS - 1)

    def num_wanted(self, view: ClusterView) -> int:
        try:
            snapshot = ray.get(ray.get_actor(ARBITER, NAMESPACE).snapshot.remote(), timeout=_ASK_TIMEOUT_S)
        except (ValueError, RayError):  # it is being started again
            return len(view.replicas)
        return sum(one["wanted"] for one in snapshot.get("deployments", []))

    def progress(self) -> tuple[int, int]:
        status = self.run.status()
        if status is not None:
            self._seen = len(status["groups"]), status["step"]
        return self._seen

    def stop(self) -> None:
        """With a commit of the step that it is at."""
        try:
            self.run.ask(Stop(self.run.name))
            self.run.wait_for_end(143)
        finally:
            end(self.run.process)
            self.timeline.close()


class Stock:
    """Ray Train's elastic trainer with (1, `most`) workers, which knows nothing of what serving wants."""

    def __init__(self, cluster: LocalCluster, spec: Path, folder: Path, most: int) -> None:
        self.name = f"Ray Train, 1 to {most} workers"
        self._cluster, self._log = cluster, folder / "stock.log"
        self._command = ["benchmarks/recovery_stock.py", str(spec), str(folder / "stock"), "--max-workers", str(most)]
        self.timeline = Timeline(lambda: _logs(cluster))

    def start(self) -> None:
        with self._log.open("wb") as log:
            command = [sys.executable, *self._command]
            self._process = subprocess.Popen(command, cwd=ROOT, env=self._cluster.environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + _STOCK_PATIENCE_S
        while not self.timeline.steps and time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"Ray Train ended:\n{self._log.read_text(errors='replace')[-4000:]}")
            time.sleep(_LOOK_EVERY_S)

    def num_wanted(self, view: ClusterView) -> int:
        return len(view.replicas)  # Serve makes a replica's actor as soon as it wants it; there it waits for a place

    def progress(self) -> tuple[int, int]:
        workers: dict[int, tuple[int, int]] = {}
        for line in list(self.timeline.lines):
            if line.fields.get("message") == "ready":
                if line.fields["rank"] in workers or any(size != line.fields["world_size"] for size, _ in workers.values()):
                    workers = {}
                workers[line.fields["rank"]] = line.fields["world_size"], line.fields["pid"]
        is_whole = bool(workers) and len(workers) == next(iter(workers.values()))[0] and all(is_alive(pid) for _, pid in workers.values())
        return len(workers) if is_whole else 0, max((step.number for step in list(self.timeline.steps)), default=0)

    def stop(self) -> None:
        end(self._process)
        self.timeline.close()


def _logs(cluster: LocalCluster) -> list[Path]:
    return [Path(cluster.temp_dir) / "session_latest" / "logs"]


def play(training: Training, cluster: LocalCluster, phases: Sequence[Phase], eos: int) -> Played:
    """Let the traffic of the phases come, and watch. The training has begun."""
    watcher = Watcher(training)
    try:
        answers, started = asyncio.run(_ask_through(cluster.http_port, phases, eos))
    finally:
        watcher.close()
    bounds = [0.0]
    for phase in phases:
        bounds.append(bounds[-1] + phase.seconds)
    samples = [Sample(one.at_s - started, *_rest(one)) for one in watcher.samples if one.at_s >= started]
    steps = [step for step in training.timeline.steps if step.at_s >= started]
    first = {number: min(step.at_s for step in steps if step.number == number) - started for number in {step.number for step in steps}}
    num_steps = [sum(begin <= at_s < until for at_s in first.values()) for begin, until in pairwise(bounds)]
    all_steps = training.timeline.steps
    return Played(samples, answers, bounds, num_steps, len(all_steps) - len({step.number for step in all_steps}))


def _rest(sample: Sample) -> tuple[Any, ...]:
    return sample.wanted, sample.placed, sample.ready, sample.groups, sample.step, sample.free


async def _ask_through(port: int, phases: Sequence[Phase], eos: int) -> tuple[list[tuple[int, Answered]], float]:
    """Requests at random times, the same on each side, whatever becomes of those before; returns the answers and when it began."""
    chance, asked, started = random.Random(7), list[tuple[int, asyncio.Task[Answered]]](), time.monotonic()
    due_s = end_s = 0.0
    for number, phase in enumerate(phases):
        end_s += phase.seconds
        while (due_s := due_s + chance.expovariate(phase.per_s)) < end_s:
            await asyncio.sleep(max(0.0, started + due_s - time.monotonic()))
            asked.append((number, asyncio.create_task(_ask(port, len(asked), eos))))
        due_s = end_s
    await asyncio.sleep(max(0.0, started + end_s - time.monotonic()))
    return [(number, await task) for number, task in asked], started


async def _ask(port: int, number: int, eos: int) -> Answered:
    body = {"model": MODELS[number % len(MODELS)], "prompt": f"the tide {number}", "max_tokens": NUM_TOKENS, "temperature": 0}
    asked_at = time.perf_counter()
    try:
        async with asyncio.timeout(_REQUEST_TIMEOUT_S):
            return await complete("127.0.0.1", port, body | {"logit_bias": {str(eos): -100}})
    except TimeoutError:
        return Answered(asked_at, error=f"no end in {_REQUEST_TIMEOUT_S:.0f} s")


class Watcher:
    """Looks at the pool about ten times a second, in a thread of its own; times are `time.monotonic`."""

    def __init__(self, training: Training) -> None:
        self.samples: list[Sample] = []
        self._training, self._closing = training, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK_EVERY_S):
            try:
                self.samples.append(self._look())
            except (RayError, TidepoolError) as error:  # Ray is busy: the next look counts
                print(f"not seen: {error!r}", file=sys.stderr)

    def _look(self) -> Sample:
        view = read_cluster()
        groups, step = self._training.progress()
        wanted = self._training.num_wanted(view)
        free = ray.available_resources().get("CPU", 0.0)
        held = NUM_SLOTS - free - num_reserved()
        placed = min(len(view.replicas), max(0, round(held)))  # Ray's table of actors has it only when the process runs, seconds later
        ready = min(placed, sum(one.is_alive for one in view.replicas))
        return Sample(time.monotonic(), wanted, placed, ready, groups, step, free)


def num_reserved() -> int:
    """The slots that training has reserved: all placement groups are its own."""
    return sum(len(one["bundles"]) for one in ray.util.placement_group_table().values() if one["state"] == "CREATED")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Raises `RuntimeError` after too long."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"Not in {_READY_TIMEOUT_S:.0f} s: {what}.")
        time.sleep(_LOOK_EVERY_S)
