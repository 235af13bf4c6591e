"""The shell of a worker on Ray Train: what Ray Train calls in each process of a replica group.

The driver, the launcher and Ray Train's controller load this module too, to pass the function on: what only a worker needs, and takes
it seconds to import, is imported when one begins.
"""

import os
import traceback
from collections.abc import Mapping
from typing import Any

import ray
from ray._raylet import setproctitle  # type: ignore[attr-defined]
from ray.actor import ActorHandle
from ray.util.metrics import Gauge

import tidepool
from tidepool.messages import NAMESPACE
from tidepool.telemetry import configure_logging
from tidepool.training.membership import Directive, Process, Report, WorkerId, coordinator_name
from tidepool.training.quorum import Rules
from tidepool.training.task import Task
from tidepool.training.versions import check_versions, installed_versions


def train_worker(config: Mapping[str, Any]) -> None:
    """`config` has the `task`, the number of the replica `group`, and the driver's `versions`. Tells the coordinator the outcome."""
    try:
        _train(config)
    except Exception as error:
        error.add_note(traceback.format_exc())  # Ray Train hands the driver the exception without it
        raise


def _train(config: Mapping[str, Any]) -> None:
    import ray.train.torch
    import torch

    from tidepool.announcement import announce
    from tidepool.training.member import Member
    from tidepool.training.process_group import MeetingPoint
    from tidepool.training.worker import run_task

    configure_logging()
    node_ip, node_id = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
    check_versions(config["versions"], installed_versions(), f"{node_ip} ({node_id})")
    task: Task = config["task"]
    context, device, rules = ray.train.get_context(), ray.train.torch.get_device(), Rules()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    line = _Line(task.spec.run, rules.lease_s)
    meeting_point = MeetingPoint(node_ip, is_gpu_shared=0 < task.spec.workers.gpus_per_worker < 1)
    hello = Report(
        worker=WorkerId(config["group"], context.get_world_rank()),
        sequence=0,
        group_size=context.get_world_size(),
        address=meeting_point.address,
        session=task.session,
        process=Process(os.getpid(), node_id, node_ip, tidepool.__path__[0]),
    )
    with Member(hello, meeting_point, device, line.report, rules) as member:
        outcome = run_task(task, member, device, [RaySink(task.spec.run)], line.account, announce)
        if outcome is not None and (outcome.result is not None or not outcome.finished):
            ray.get(line.coordinator().set_outcome.remote(outcome))


class _Line:
    """The line to the run's coordinator, which may be replaced by another one under the same name."""

    def __init__(self, run: str, timeout_s: float) -> None:
        self._run, self._timeout_s = run, timeout_s
        self._actor: ActorHandle | None = None

    def coordinator(self) -> ActorHandle:
        """The actor; raises `ValueError` while there is none."""
        actor = self._actor or ray.get_actor(coordinator_name(self._run), NAMESPACE)
        self._actor = actor  # which another thread may forget at any time
        return actor

    def report(self, report: Report) -> Directive:
        """Hand a report in. Raises `OSError` if nobody answers in time."""
        worker = report.worker
        setproctitle(f"ray::tidepool run {self._run} group {worker.group} rank {worker.rank} step {report.step or 0} {report.phase}")
        try:
            directive: Directive = ray.get(self.coordinator().report.remote(report), timeout=self._timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ValueError) as error:
            self._actor = None
            raise ConnectionError(str(error).partition("\n")[0]) from error
        return directive

    def account(self) -> dict[str, Any]:
        """Where the run's time went so far; nothing if the coordinator is being replaced."""
        try:
            account: dict[str, Any] = ray.get(self.coordinator().account.remote(), timeout=self._timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ValueError):
            self._actor = None
            return {}
        return account


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
