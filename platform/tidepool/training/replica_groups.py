"""The replica groups of a run on a Ray cluster: started, ended, counted. A shell around Ray Train's public API.

Each is one `fit()` of Ray Train's trainer (see `trainer`), of fixed size, inside a launcher actor of its own (0 CPUs): a `fit()` has
no public way to be cancelled, but a launcher can be ended, and takes its workers with it. Its placement group Ray Train lets go of
only once the workers have started; before that, Ray would keep it (or its demand) until the job ends, so that it is removed here.
"""

import os
import signal
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray._private.state
from ray.actor import ActorHandle
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tidepool.collector import collector_paused
from tidepool.errors import TidepoolError
from tidepool.messages import Places
from tidepool.scratch import ScratchFolder
from tidepool.specs import WorkersSpec
from tidepool.telemetry import configure_logging
from tidepool.training.coordinator import Condemned
from tidepool.training.standby import RUNTIME_ENV, start_processes
from tidepool.training.task import Task
from tidepool.training.versions import installed_versions

_ORPHANED_WITHIN_S = 30.0
"""So long after a launcher was ended its controller may still be dying."""
_SETTLE_S = 10.0
"""So long after a group has ended what took its place still starts, and needs the cores."""
_NODE_LABEL = "ray.io/node-id"
WorkerFunction = Callable[[Mapping[str, Any]], None]
"""What runs in each process of a replica group: its `task`, the number of its `group`, the driver's `versions`."""


class Launcher:
    """Holds one `fit()`; made an actor of its own for each replica group. `versions` are those of the driver."""

    def __init__(self, versions: Mapping[str, str]) -> None:
        self._versions = versions
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # the driver looks for nodes that are about to go

    def load(self) -> None:
        """Import what `fit` needs."""
        with collector_paused():
            import tidepool.training.trainer  # noqa: F401

    def fit(self, worker: WorkerFunction, task: Task, group: int, places: Places) -> tuple[Exception, str, tuple[int, ...]] | None:
        """Run one replica group, there, to its end; returns its error with a traceback and the ranks at fault, None if it ended well."""
        self.load()
        from ray.train import FailureConfig, RunConfig, ScalingConfig  # here: the driver of a run does without Ray Train
        from ray.train.v2.api.exceptions import TrainingFailedError

        from tidepool.training.trainer import GroupTrainer

        configure_logging()
        workers = task.spec.workers
        scaling = ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=bool(workers.gpus_per_worker),
            resources_per_worker=_resources(workers),
            label_selector=[{_NODE_LABEL: node} for node, num_workers in places for _ in range(num_workers)],
        )
        with ScratchFolder("train") as folder:
            trainer = GroupTrainer(
                worker,
                train_loop_config={"task": task, "group": group, "versions": self._versions},
                scaling_config=scaling,
                run_config=RunConfig(
                    name=f"{task.spec.run}-{task.session}-{group}",
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=0),
                    worker_runtime_env=RUNTIME_ENV,
                ),
            )
            try:
                trainer.fit()
            except TrainingFailedError as error:
                return _cause(error)
        return None


@dataclass
class ReplicaGroup:
    """One that was started and has not ended; `grant` is the name of the grant that it was started on, with its `places`."""

    number: int
    grant: str
    places: Places
    launcher: ActorHandle
    fit: "ray.ObjectRef[Any]"
    started_s: float
    """Since 1970."""
    is_leaving: bool = False
    has_come: bool = False


@dataclass(frozen=True)
class Ended:
    """A group that is no more, and the error of its workers with a traceback, if that is why.

    `failed` are the ranks of those that died of what may be their node's fault.
    """

    number: int
    error: Exception | None
    detail: str
    failed: tuple[int, ...] = ()
    places: Places = ()


class ReplicaGroups:
    """Those of one driver's life. Numbers are never used again."""

    def __init__(self, worker: WorkerFunction, task: Task) -> None:
        self._worker, self._task = worker, task
        self.num_started = 0
        self.running: dict[int, ReplicaGroup] = {}
        self._vacated: list[Places] = []
        """Where groups were, the latest last."""
        self._standby: list[tuple[str, ActorHandle]] = []
        """Launchers that wait, each with its node."""
        self._ended_at = float("-inf")

    def stand_by(self, most: int) -> None:
        """Have launchers and processes wait where groups have left, for up to `most` groups in all; nothing while anything changes."""
        if self.pending() or time.monotonic() - self._ended_at < _SETTLE_S:
            return
        missing = most - len(self.running) - len(self._standby)
        for _ in range(min(missing, len(self._vacated))):
            places = self._vacated.pop()
            launcher = _new_launcher(places)
            launcher.load.remote()
            self._standby.append((_node_of(places), launcher))
            start_processes(places)

    def close(self) -> None:
        """End them all, and what waits."""
        for number in list(self.running):
            self.end(number)
        for _, launcher in self._standby:
            ray.kill(launcher)

    def start(self, grant: str, places: Places) -> ReplicaGroup:
        """Start another group on what was granted; it pends until what was there before has left."""
        self.num_started += 1
        if places in self._vacated:
            self._vacated.remove(places)
        waiting = next((one for one in self._standby if one[0] == _node_of(places)), None)
        if waiting is not None:
            self._standby.remove(waiting)
        launcher = waiting[1] if waiting is not None else _new_launcher(places)
        fit = launcher.fit.remote(self._worker, self._task, self.num_started, places)
        group = ReplicaGroup(self.num_started, grant, places, launcher, fit, time.time())
        self.running[group.number] = group
        return group

    def end(self, number: int) -> None:
        """End a group: its launcher, and with it the workers; `wait` sees to the placement group, whether it is held or pends."""
        group = self.running.pop(number)
        ray.kill(group.launcher)
        self._vacated.append(group.places)
        self._ended_at = time.monotonic()

    def wait(self, timeout_s: float, others: Collection["ray.ObjectRef[Any]"] = ()) -> list[Ended]:
        """The groups that ended since the last call; waits for one to end, or for one of the `others`."""
        if time.monotonic() - self._ended_at < _ORPHANED_WITHIN_S:
            _remove_orphans()
        by_fit = {group.fit: group for group in self.running.values()}
        if not by_fit and not others:
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait([*by_fit, *others], num_returns=1, timeout=timeout_s)
        return [self._ended(by_fit[fit]) for fit in ready if fit in by_fit]

    def _ended(self, group: ReplicaGroup) -> Ended:
        try:
            failed = ray.get(group.fit)
        except ray.exceptions.RayActorError as error:
            failed = RuntimeError(f"the launcher of group {group.number} died"), str(error), ()
        self.end(group.number)
        if not failed:
            return Ended(group.number, None, "")
        cause, detail, ranks = failed
        return Ended(group.number, cause, detail, () if group.is_leaving else ranks, group.places)

    def note_come(self, heard: Iterable[int]) -> None:
        """Workers of these groups have reported. It stays noted: a coordinator that was started again has heard nobody yet."""
        for number in self.running.keys() & set(heard):
            self.running[number].has_come = True

    def pending(self) -> list[ReplicaGroup]:
        """The groups of which no worker has ever reported."""
        return [group for group in self.running.values() if not group.has_come]


def _new_launcher(places: Places) -> ActorHandle:
    """On a node of its group: anywhere else it could end, with its node, a group that has nothing to do with that."""
    strategy = NodeAffinitySchedulingStrategy(_node_of(places), soft=False)  # Ray puts actors of 0 CPUs anywhere where it is soft
    return ray.remote(num_cpus=0)(Launcher).options(scheduling_strategy=strategy).remote(installed_versions())


def _node_of(places: Places) -> str:
    return places[0][0]


def _remove_orphans() -> None:
    """Remove the placement groups of this job whose maker (a controller of Ray Train's) is dead."""
    job = ray.get_runtime_context().get_job_id()
    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    for one in map(gcs_pb2.PlacementGroupTableData.FromString, table):  # which knows the maker; the public table does not
        is_held = one.state != gcs_pb2.PlacementGroupTableData.REMOVED
        if is_held and one.creator_actor_dead and one.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(one.placement_group_id)))


def draining_nodes() -> set[str]:
    """The ids of the nodes that are about to go (`ray drain-node`, a spot notice, the autoscaler)."""
    return set(ray._private.state.state.get_draining_nodes())  # what Ray Train and Serve ask; there is no public way to


def end_process(condemned: Condemned) -> None:
    """Kill a worker's process where it runs; what has another program by now is left alone."""
    strategy = NodeAffinitySchedulingStrategy(condemned.node_id, soft=False)
    ray.remote(num_cpus=0, max_retries=0)(_kill_worker).options(scheduling_strategy=strategy).remote(condemned.pid)


def _kill_worker(pid: int) -> None:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return  # it is gone
    if command.startswith(b"ray::"):
        os.kill(pid, signal.SIGKILL)


def _resources(workers: WorkersSpec) -> dict[str, float]:
    return {"CPU": workers.cpus_per_worker} | ({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {})


def _cause(error: Exception) -> tuple[Exception, str, tuple[int, ...]]:
    """What made a `fit()` fail: of a worker group an error of ours if any worker has one, else the first worker's.

    With it the ranks of the workers that failed; none where the error is ours, since a person must act on that wherever it is.
    """
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    causes = list(failures.values()) or [error]
    own = next((ours for cause in causes if (ours := _own_error(cause)) is not None), None)
    detail = "".join(traceback.format_exception(causes[0]))
    # Other exceptions may not survive pickling on the way to the driver: their type's name and text do.
    return own or RuntimeError(f"{type(causes[0]).__name__}: {causes[0]}"), detail, () if own else tuple(failures)


def _own_error(error: BaseException | None) -> TidepoolError | None:
    """The error of ours that Ray's wrappers hold, if any."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, TidepoolError):
            return error
        seen.add(id(error))
        error = getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error.__cause__
    return None
