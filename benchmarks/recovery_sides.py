"""The two sides of `recovery`: a run of three workers on a cluster of its own, that can lose, give back and get one.

Both have the same two nodes: the head with room for two workers and one with room for the third.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray
import yaml
from recovery_cluster import Cluster, end
from recovery_timeline import Timeline

from tests.training.conftest import prepare_dataset
from tidepool.messages import NAMESPACE, Resize
from tidepool.training.membership import coordinator_name

ROOT = Path(__file__).resolve().parents[1]
NUM_WORKERS = 3
CHECKPOINT_EVERY_STEPS = 5
NOTICE_S = 10
"""What a node that leaves is given, on the side that hears of nodes."""
_START_TIMEOUT_S = 300
MODEL = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Worker:
    """A worker that takes part in the steps now."""

    rank: int
    pid: int


class Side(Protocol):
    """A system under test. `timeline` is there from `start` on."""

    name: str
    timeline: Timeline

    def start(self) -> None:
        """Start a cluster and a run on it; returns once three workers take steps."""
        ...

    def workers(self) -> list[Worker]:
        """Those that take the steps now, by rank; may be empty while they start."""
        ...

    def shrink(self) -> None:
        """Make one of three workers leave; returns once that is asked for."""
        ...

    def grow(self) -> None:
        """Make a third worker join; returns once that is asked for."""
        ...

    def stop(self) -> None:
        """End everything; nothing is left."""
        ...


class Work:
    """What both sides train: a dataset in a store in `folder`, and the spec of a run on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store_url = (folder / "store").as_uri()
        prepare_dataset(self.store_url, folder / "texts")

    def write_spec(self, run: str, **changes: Any) -> Path:
        """The spec of a run that does not end by itself."""
        training = {"steps": 1_000_000, "global_batch_size": 12, "num_shards": 6, "micro_batch_size": 2, "precision": "fp32"}
        training |= {
            "evaluate_every_steps": 1_000_000,
            "evaluate_num_samples": 1,
            "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
        }
        spec = {"store": self.store_url, "run": run, "dataset": "tides", "seed": 3, "model": {"config": MODEL}, "training": training}
        spec |= {"checkpoint": {"every_steps": CHECKPOINT_EVERY_STEPS, "keep": 3}}
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(spec | changes))
        return path


class _Job:
    """A driver on a cluster, as a process of this machine."""

    def __init__(self, work: Work, run: str, command: list[str], variables: dict[str, str]) -> None:
        self.cluster = Cluster(work.store_url, NUM_WORKERS - 1, variables)
        try:
            self.cluster.join(1)
        except BaseException:
            self.cluster.stop()
            raise
        self.timeline = Timeline(lambda: self.cluster.logs)
        self.log = work.folder / f"{run}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=self.cluster.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def wait(self, condition: Callable[[], bool], timeout_s: float = _START_TIMEOUT_S) -> None:
        """Until a condition is met. Raises `RuntimeError` that holds the job's output if it ends first or it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The job {self.log.stem} does not come so far:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the driver, then the cluster."""
        try:
            self.timeline.close()
            end(self.process)
        finally:
            self.cluster.stop()


class StockSide:
    """Ray Train's own elasticity: it follows the nodes, which join and leave after a notice."""

    def __init__(self, work: Work, name: str, run: str, options: list[str], variables: dict[str, str]) -> None:
        """`options` are those of `recovery_stock`; `variables` are set for all of Ray's processes."""
        self.name = name
        self._work, self._run, self._options, self._variables = work, run, options, variables
        self._job: _Job | None = None

    def start(self) -> None:
        folder = self._work.folder / f"{self._run}-results"
        command = ["benchmarks/recovery_stock.py", str(self._work.write_spec(self._run)), str(folder), *self._options]
        self._job = _Job(self._work, self._run, command, self._variables)
        self.timeline = self._job.timeline
        self._job.wait(lambda: len(self.workers()) == NUM_WORKERS and len(self.timeline.steps) > 0)

    def workers(self) -> list[Worker]:
        attempt: dict[int, tuple[int, int]] = {}
        for line in list(self.timeline.lines):
            if line.fields.get("message") != "ready":
                continue
            rank, size = line.fields["rank"], line.fields["world_size"]
            if rank in attempt or any(other != size for _, other in attempt.values()):
                attempt = {}
            attempt[rank] = (line.fields["pid"], size)
        workers = [Worker(rank, pid) for rank, (pid, _) in sorted(attempt.items())]
        complete = bool(attempt) and len(attempt) == max(size for _, size in attempt.values())
        return workers if complete and all(is_alive(worker.pid) for worker in workers) else []

    def shrink(self) -> None:
        assert self._job is not None
        self._job.cluster.leave(NOTICE_S)

    def grow(self) -> None:
        assert self._job is not None
        self._job.cluster.join(1)

    def stop(self) -> None:
        if self._job is not None:
            self._job.stop()


class TidepoolSide:
    """Ours: replica groups of one worker, asked for by number."""

    name = "Tidepool"

    def __init__(self, work: Work, run: str) -> None:
        self._work, self._run = work, run
        self._job: _Job | None = None

    def start(self) -> None:
        spec = self._work.write_spec(self._run, elastic={"min": 1, "max": NUM_WORKERS})
        self._job = _Job(self._work, self._run, ["jobs/train.py", str(spec)], {})
        self.timeline = self._job.timeline
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(self._job.cluster.address, namespace=NAMESPACE, logging_level="ERROR", log_to_driver=False)
        signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process at once, and nothing that was started
        self._job.wait(lambda: len(self.workers()) == NUM_WORKERS and len(self.timeline.steps) > 0)

    def workers(self) -> list[Worker]:
        try:
            status = ray.get(ray.get_actor(coordinator_name(self._run)).status.remote(), timeout=10)
        except (ValueError, ray.exceptions.RayActorError):
            return []
        if not status["is_stepping"]:
            return []
        return sorted((Worker(one["rank"], one["pid"]) for one in status["workers"] if one["rank"] is not None), key=lambda one: one.rank)

    def shrink(self) -> None:
        self._resize(NUM_WORKERS - 1)

    def grow(self) -> None:
        self._resize(NUM_WORKERS)

    def stop(self) -> None:
        try:
            ray.shutdown()
        finally:
            if self._job is not None:
                self._job.stop()

    def _resize(self, num_groups: int) -> None:
        ray.get(ray.get_actor(coordinator_name(self._run)).ask.remote(Resize(self._run, num_groups)))


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
