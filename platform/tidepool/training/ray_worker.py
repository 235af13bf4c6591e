"""The shell of a worker on Ray Train: what `TorchTrainer` calls in each process of the worker group."""

import os
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.actor import ActorHandle
from ray.util.metrics import Gauge

import tidepool
from tidepool.telemetry import configure_logging
from tidepool.training.coordinator import Heartbeat
from tidepool.training.group import Group, LocalGroup, ProcessGroup
from tidepool.training.versions import check_versions, installed_versions
from tidepool.training.worker import Task, run_task

NAMESPACE = "tidepool"


def coordinator_name(run: str) -> str:
    """The name of a run's coordinator actor in the namespace `tidepool`."""
    return f"tidepool-run-{run}"


def train_worker(config: Mapping[str, Any]) -> None:
    """`config` has the `task` and the driver's `versions`. Reports the outcome to the run's coordinator."""
    configure_logging()
    node = f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()})"
    check_versions(config["versions"], installed_versions(), node)
    task: Task = config["task"]
    coordinator = ray.get_actor(coordinator_name(task.spec.run), NAMESPACE)
    context = ray.train.get_context()
    group: Group = ProcessGroup() if context.get_world_size() > 1 else LocalGroup()
    beat = _Beat(coordinator, task.incarnation.number, group.rank)
    outcome = run_task(task, group, ray.train.torch.get_device(), [RaySink(task.spec.run)], beat)
    if group.rank == 0:
        ray.get(coordinator.set_outcome.remote(outcome))


class RaySink:
    """Sets a gauge of Ray's metrics for each value, `tidepool_train_<name>`, with the run as its tag."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in {"step": step, **values}.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"tidepool_train_{name}", description=f"{name} of a training run", tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self._run})

    def flush(self) -> None:
        """Nothing to do: Ray's agents export the gauges."""


class _Beat:
    """Sends heartbeats without waiting for them: the wish to stop comes with the answer to an earlier one."""

    def __init__(self, coordinator: ActorHandle, incarnation: int, rank: int) -> None:
        self._coordinator, self._incarnation, self._rank = coordinator, incarnation, rank
        self._node_id = ray.get_runtime_context().get_node_id()
        self._unanswered: list[Any] = []
        self._stopping = False

    def __call__(self, step: int, phase: str) -> bool:
        beat = Heartbeat(self._incarnation, self._rank, step, phase, os.getpid(), self._node_id, tidepool.__path__[0])
        self._unanswered.append(self._coordinator.heartbeat.remote(beat))
        answered, self._unanswered = ray.wait(self._unanswered, num_returns=len(self._unanswered), timeout=0)
        self._stopping = self._stopping or any(ray.get(answered))
        return self._stopping
