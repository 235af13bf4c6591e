"""The driver of a run on a Ray cluster: from a spec to a result, restarting workers that fail. A shell around pure parts.

Each incarnation is one `TorchTrainer.fit()` of fixed size inside a launcher actor of its own (0 CPUs): a `fit()` has no
public way to be cancelled, but a launcher can be ended, and takes its workers with it.

Invariants:
- A run has one driver in a cluster (the coordinator's name) and one incarnation that advances in the store.
- SIGTERM and SIGINT let the workers commit and leave first; what was committed before is there in any case.
- The driver holds no state that the store does not have: submitting the same spec again continues the run.
"""

import logging
import os
import signal
import socket
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

import tidepool
from tidepool.checkpoint import Incarnation, claim_incarnation
from tidepool.errors import ClusterError, RunError, SpecError, TidepoolError
from tidepool.scratch import ScratchFolder
from tidepool.specs import RunSpec, WorkersSpec
from tidepool.storage import open_store
from tidepool.telemetry import configure_logging
from tidepool.training.coordinator import Coordinator
from tidepool.training.outcome import Outcome
from tidepool.training.pins import read_pins, resolve
from tidepool.training.ray_worker import NAMESPACE, coordinator_name, train_worker
from tidepool.training.restarts import Failure, give_up
from tidepool.training.versions import installed_versions
from tidepool.training.worker import Task, read_result

_logger = logging.getLogger(__name__)
_POLL_S = 0.5
_CONNECT_TIMEOUT_S = 10
_COLLECTIVE_TIMEOUT_S = 600


def train(spec: RunSpec) -> Outcome:
    """Run or continue a run to its end, or until it is asked to stop. Raises any of Tidepool's errors."""
    if spec.store.startswith("memory://"):
        raise SpecError(f"store: {spec.store} is another store in each process: give s3://bucket/prefix, or file:/// and an absolute path.")
    store = open_store(spec.store)
    pins = read_pins(spec, store) or resolve(spec, store)
    if (result := read_result(store, spec.run)) is not None:
        _logger.info("run %s is finished; give another `run` name to train again", spec.run)
        return Outcome(True, result["steps"], result)
    with _connection(), _coordinator(spec.run) as coordinator, _stop_signals() as stop:
        failures: list[Failure] = []
        while True:
            incarnation = claim_incarnation(store, spec.run, {"spec_digest": spec.digest})
            task = Task(spec, pins, incarnation)
            failure = _run_incarnation(task, coordinator, stop)
            outcome: Outcome | None = ray.get(coordinator.outcome.remote())
            if outcome is not None:
                return outcome
            if failure is None:
                return Outcome(False, _base_step(incarnation), None)
            failures.append(failure)
            if error := give_up(failures, spec.workers.max_restarts):
                raise error
            _logger.warning(
                "workers of run %s failed at step %d (%s); %sstarting them again", spec.run, failure.step, failure.summary, failure.hint
            )
            pins = read_pins(spec, store) or pins


@contextmanager
def _connection() -> Iterator[None]:
    """Connect to the running Ray cluster and ship this library to its workers. Raises `ClusterError` if there is none."""
    if ray.is_initialized():
        yield
        return
    _check_address()
    try:
        ray.init("auto", namespace=NAMESPACE, runtime_env={"py_modules": [tidepool.__path__[0]]}, log_to_driver=True)
    except ConnectionError as error:
        raise _no_cluster() from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise ClusterError(
            f"This driver does not fit the cluster: use the environment that its nodes were started from. {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()  # after this no line of a worker comes between ours


def _check_address() -> None:
    """Raises `ClusterError` if nothing listens at `RAY_ADDRESS`, where Ray itself would go on trying for minutes."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if not host or not port.isdigit() or "://" in host:  # none, or one that Ray itself looks up
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(f" at {host}:{port} (RAY_ADDRESS)") from error


def _no_cluster(where: str = "") -> ClusterError:
    return ClusterError(
        f"No Ray cluster answers{where}. Start one with `make up` (or `ray up cluster.yaml`), or submit with `ray job submit`."
    )


class Launcher:
    """Holds one `fit()`; made an actor of its own for each incarnation. `versions` are those of the driver."""

    def __init__(self, versions: Mapping[str, str]) -> None:
        self._versions = versions

    def fit(self, task: Task) -> Failure | None:
        """Run one incarnation to its end; returns how it failed, None if it did not."""
        configure_logging()
        workers = task.spec.workers
        with ScratchFolder("train") as folder:
            trainer = TorchTrainer(
                train_worker,
                train_loop_config={"task": task, "versions": self._versions},
                scaling_config=_scaling(workers),
                torch_config=TorchConfig(backend="nccl" if workers.gpus_per_worker else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
                run_config=RunConfig(
                    name=f"{task.spec.run}-{task.incarnation.number}", storage_path=folder, failure_config=FailureConfig(max_failures=0)
                ),
            )
            try:
                trainer.fit()
            except TrainingFailedError as error:
                return _failure(error, task)
        return None


def _run_incarnation(task: Task, coordinator: ActorHandle, stop: "_StopSignal") -> Failure | None:
    """Run one incarnation; returns how it failed, None if it ended well or was stopped before it began."""
    _report_waiting(task.spec.workers)
    launcher = ray.remote(num_cpus=0)(Launcher).remote(installed_versions())
    pending = launcher.fit.remote(task)
    asked = False
    try:
        while not ray.wait([pending], timeout=_POLL_S)[0]:
            if stop.received and not asked:
                _logger.info("stopping run %s after a commit at the next step", task.spec.run)
                asked = True
                if not ray.get(coordinator.request_stop.remote()):
                    return None
        failure: Failure | None = ray.get(pending)
    except ray.exceptions.RayActorError as error:
        failure = Failure(_base_step(task.incarnation), 0, error, str(error))
    finally:
        ray.kill(launcher)
    if failure is None:
        return None
    workers = ray.get(coordinator.status.remote())["workers"]
    step = max((worker["step"] for worker in workers), default=failure.base_step)
    return Failure(failure.base_step, step, failure.error, failure.detail)


def _scaling(workers: WorkersSpec) -> ScalingConfig:
    resources = {"CPU": workers.cpus_per_worker} | ({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {})
    return ScalingConfig(num_workers=workers.num_workers, use_gpu=bool(workers.gpus_per_worker), resources_per_worker=resources)


def _report_waiting(workers: WorkersSpec) -> None:
    """Say what the workers wait for, if the cluster does not have it: it may come (autoscaler), so this is no error."""
    free = ray.available_resources()
    for name, each in {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}.items():
        if free.get(name, 0) < each * workers.num_workers:
            _logger.warning(
                "waiting for %g %s (%d workers, %g each); free in the cluster now: %g of %g",
                *(each * workers.num_workers, name, workers.num_workers, each, free.get(name, 0), ray.cluster_resources().get(name, 0)),
            )


def _failure(error: TrainingFailedError, task: Task) -> Failure:
    """What made a worker group fail: an error of ours if any worker has one, else the first worker's."""
    causes = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else [error]
    own = next((ours for cause in causes if (ours := _own_error(cause)) is not None), None)
    detail = "".join(traceback.format_exception(causes[0]))
    # Other exceptions may not survive pickling on the way to the driver: their type's name and text do.
    chosen = own or RuntimeError(f"{type(causes[0]).__name__}: {causes[0]}")
    return Failure(_base_step(task.incarnation), 0, chosen, detail)


def _own_error(error: BaseException | None) -> TidepoolError | None:
    """The error of ours that Ray's wrappers hold, if any."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, TidepoolError):
            return error
        seen.add(id(error))
        error = getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error.__cause__
    return None


def _base_step(incarnation: Incarnation) -> int:
    return incarnation.base.step if incarnation.base else 0


@contextmanager
def _coordinator(run: str) -> Iterator[ActorHandle]:
    try:
        actor = ray.remote(num_cpus=0)(Coordinator).options(name=coordinator_name(run), namespace=NAMESPACE).remote()
    except ValueError as error:  # Ray's way to say that the name is taken
        raise RunError(
            f"Run {run} is being trained in this cluster already: wait for it, stop its job (`ray job list`, `ray job stop ID`), "
            "or choose another `run` name."
        ) from error
    try:
        yield actor
    finally:
        ray.kill(actor)


class _StopSignal:
    received = False

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


@contextmanager
def _stop_signals() -> Iterator[_StopSignal]:
    """Notes SIGTERM and SIGINT for the block; a second SIGINT interrupts at once."""
    stop = _StopSignal()
    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
