"""The driver of a run on a Ray cluster: from a spec to a result, through replica groups that come and go. A shell around pure parts.

Invariants:
- A run has one driver in a cluster (the coordinator's name) and one incarnation that advances in the store.
- A group is started on a grant of the arbiter's alone, and leaves when it is asked back. Asked for all of them, the run commits, lets
  them go, and waits in the queue.
- When a group dies nobody else is touched: the quorum goes on without it, and another group is granted.
- SIGTERM and SIGINT let the workers commit and leave first; what was committed before is there in any case.
- The driver holds no state that the store does not have: submitting the same spec again continues the run.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import tidepool
from tidepool.checkpoint import Incarnation, RunLog, claim_incarnation, read_manifest
from tidepool.cluster_address import listens
from tidepool.errors import ClusterError, CorruptCheckpointError, RunError, SpecError, StoreError
from tidepool.messages import NAMESPACE, Group, Pause, Resize, RunReport, Standing, Stop, WorkerDeath
from tidepool.run_queue import Ending, is_final, note_done, note_wanted, read_priority, submission_id
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, open_store
from tidepool.training.coordinator import Beginning, Coordinator, Orders
from tidepool.training.membership import WorkerId, coordinator_name
from tidepool.training.outcome import Outcome, read_result
from tidepool.training.pauses import note_paused, note_resumed
from tidepool.training.pins import read_pins
from tidepool.training.pool_link import PoolLink, first_report
from tidepool.training.quorum import Rules
from tidepool.training.quorum_events import Claimed
from tidepool.training.ray_worker import train_worker
from tidepool.training.replica_groups import (
    Ended,
    ReplicaGroup,
    ReplicaGroups,
    WorkerFunction,
    draining_nodes,
    end_process,
)
from tidepool.training.restarts import Failure, give_up
from tidepool.training.task import Pins, Task

_logger = logging.getLogger(__name__)
_POLL_S = 0.2
_DRAIN_POLL_S = 1.0
_PULSE_S = 1.0
_PULSE_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 10
_NAME_TIMEOUT_S = 20
_LEAVE_TIMEOUT_S = 10
"""How long workers may take to end by themselves once the run has."""
_PLACE_TIMEOUT_S = 180
"""How long a group above the minimum may wait for its place."""
_BACK_OFF_S = 60
_MAX_DEATHS = 100


def train(spec: RunSpec, worker: WorkerFunction = train_worker) -> Outcome:
    """Run or continue a run to its end, or until it is asked to stop. Raises any of Tidepool's errors.

    `worker` is what each process of a replica group runs.
    """
    if spec.store.startswith("memory://"):
        raise SpecError(f"store: {spec.store} is another store in each process: give s3://bucket/prefix, or file:/// and an absolute path.")
    store = open_store(spec.store)
    pins = read_pins(spec, store) or _resolve(spec, store)
    if (result := read_result(store, spec.run)) is not None:
        _logger.info("run %s is finished; give another `run` name to train again", spec.run)
        return Outcome(True, result["steps"], result)
    note_resumed(store, spec.run)
    with _connection(), closing(_Run(spec, pins, store, worker)) as run, _stop_signals() as stop:
        return run.live(stop)


def _resolve(spec: RunSpec, store: ObjectStore) -> Pins:
    from tidepool.training.resolution import resolve  # which brings transformers: a run that goes on does without

    return resolve(spec, store)


class _Run:
    """One driver's life of a run: its coordinator, its replica groups, and what went wrong so far."""

    def __init__(self, spec: RunSpec, pins: Pins, store: ObjectStore, worker: WorkerFunction) -> None:
        self._spec, self._store = spec, store
        self._coordinator = _make_coordinator(spec.run)
        self._heard = self._coordinator, 0.0
        """The coordinator, and its clock as it was last heard."""
        self._claimed = claim_incarnation(store, spec.run, {"spec_digest": spec.digest})
        self._groups = ReplicaGroups(worker, Task(spec, pins, self._claimed.number))
        queued = note_wanted(store, spec, self._claimed.number)
        self._pool, self._report = PoolLink(), first_report(spec, queued, read_priority(store, spec.run))
        self._used_grants: set[str] = set()
        self._session, self._epoch = self._claimed.number, 0
        self._begin()
        self._failures: list[Failure] = []
        self._deaths: dict[str, WorkerDeath] = {}
        self._grows_after = 0.0
        self._stop_asked = self._is_pausing = self._entered_quorum = False
        self._drained_at = 0.0
        self._num_groups = spec.elastic.max
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._keep_leases, name="pulse", daemon=True)
        self._pulse.start()

    def close(self) -> None:
        """End everything that is left of the run in the cluster."""
        self._ended.set()
        self._pulse.join()
        self._groups.close()
        self._pool.close(self._spec.run, self._session)
        ray.kill(self._coordinator)

    def live(self, stop: "_StopSignal") -> Outcome:
        """Drive the run to its end, and say in the list of runs if nobody is to go on with it. Raises as `train`."""
        try:
            outcome = self.drive(stop)
        except BaseException as error:
            if is_final(error):
                self._note_done("failed", str(error))
            raise
        if outcome.finished or outcome.is_paused:
            self._note_done("finished" if outcome.finished else "paused")
        elif not stop.received or submission_id() is None:
            self._note_done("stopped")
        # else it may be the machine that ends: whether a person has stopped the job, Ray knows, and the arbiter asks
        return outcome

    def _note_done(self, how: Ending, reason: str = "") -> None:
        try:
            note_done(self._store, self._spec.run, self._session, how, reason)
        except StoreError as error:
            _logger.warning("that run %s is done was not noted, so that it may be submitted again: %s", self._spec.run, error)

    def drive(self, stop: "_StopSignal") -> Outcome:
        """See `train`."""
        while True:
            orders = self._orders()
            self._is_pausing = self._is_pausing or orders.is_pausing  # before the outcome: both may have come since the last time
            if orders.outcome is not None:
                return self._finish(orders.outcome)
            if orders.fatal is not None:
                raise RunError(f"Run {self._spec.run} cannot go on: {orders.fatal}.")
            if stop.received and not orders.is_stopping:
                ray.get(self._coordinator.ask.remote(Stop(self._spec.run)))
            elif orders.is_stopping and not self._stop_asked:
                self._stop_asked = True
                _logger.info("%s run %s after a commit at the next step", "pausing" if self._is_pausing else "stopping", self._spec.run)
            is_anybody_there = self._entered_quorum and self._groups.running.keys() & orders.heard - orders.gone
            if self._stop_asked and not orders.members and not is_anybody_there:
                commits = RunLog(self._store, self._spec.run).visible_commits()  # nobody is there who holds anything newer
                return self._finish(Outcome(False, commits[0].step if commits else 0, None))
            self._entered_quorum = self._entered_quorum or bool(orders.members)
            for condemned in orders.condemned:
                _logger.warning("killing worker %s (pid %d): it %s", condemned.worker, condemned.pid, condemned.why)
                end_process(condemned)
            if orders.needs_claim:
                self._claim_again()
            self._resize(orders)
            for ended in self._groups.wait(_POLL_S, self._pool.open):
                outcome = self._note_end(ended, orders)
                if outcome is not None:
                    return self._finish(outcome)

    # --- Replica groups -----------------------------------------------------------------------------------------------

    def _resize(self, orders: Orders) -> None:
        self._num_groups = orders.num_groups
        self._groups.note_come(orders.heard)
        self._deaths |= {death.worker: death for death in orders.deaths}
        standing = self._pool.exchange(self._report_now(orders))
        if self._stop_asked:
            return
        self._let_leave(orders, standing)
        for grant in standing.grants if standing else ():
            if grant.name not in self._used_grants:
                self._used_grants.add(grant.name)
                group = self._groups.start(grant.name, grant.places)
                _logger.info("starting replica group %d: %s", group.number, grant.reason)
        self._groups.stand_by(orders.num_groups)

    def _report_now(self, orders: Orders) -> RunReport:
        """What the run has and wants. A group that did not come is not asked for again at once."""
        running = self._groups.running.values()
        pending = {group.number for group in self._groups.pending()}
        is_backing_off = time.monotonic() < self._grows_after
        num_staying = sum(not group.is_leaving for group in running)
        wanted = max(self._spec.elastic.min, min(orders.num_groups, num_staying)) if is_backing_off else orders.num_groups
        return replace(
            self._report,
            max_groups=0 if self._stop_asked else wanted,
            groups=tuple(Group(group.grant, group.places, group.started_s, group.is_leaving) for group in running),
            settled=frozenset(group.grant for group in running if group.number not in pending),
            deaths=tuple(self._deaths.values())[-_MAX_DEATHS:],
            stragglers=orders.stragglers,
        )

    def _let_leave(self, orders: Orders, standing: Standing | None) -> None:
        """Let those groups go that are asked for, are more than is wanted, or are on nodes that go; end those that have left."""
        elastic, running = self._spec.elastic, self._groups.running
        asked_for = dict(standing.leave) if standing else {}
        staying = [group for group in running.values() if not group.is_leaving]
        for group in [group for group in staying if group.grant in asked_for]:
            self._release(group, asked_for[group.grant])
        staying = [group for group in staying if not group.is_leaving]
        staying.sort(key=lambda group: group.number not in orders.members)  # the newest leave first, and before them who takes no steps
        for group in staying[orders.num_groups :]:
            self._release(group, "fewer groups are wanted")
        for number in self._on_draining_nodes(orders):
            self._release(running[number], "its node is about to go")
        for number in orders.gone & running.keys():
            if running[number].is_leaving:  # faster than Ray Train, which looks every two seconds
                self._groups.end(number)
                ray.get(self._coordinator.group_ended.remote(number))
        for group in self._groups.pending():
            is_late = time.time() - group.started_s > _PLACE_TIMEOUT_S and len(staying) > elastic.min
            if is_late or group.is_leaving:
                self._groups.end(group.number)
                if is_late:
                    self._grows_after = time.monotonic() + _BACK_OFF_S

    def _release(self, group: ReplicaGroup, why: str) -> None:
        _logger.info("group %d is to leave at the next step: %s", group.number, why)
        group.is_leaving = True
        self._coordinator.release.remote((group.number,))

    def _on_draining_nodes(self, orders: Orders) -> set[int]:
        """The groups that stay and have a worker on a node that is drained."""
        if time.monotonic() - self._drained_at < _DRAIN_POLL_S:
            return set()
        self._drained_at = time.monotonic()
        draining = draining_nodes()
        found = {group for group, node in orders.places if node in draining}
        return {number for number in found & self._groups.running.keys() if not self._groups.running[number].is_leaving}

    def _note_end(self, ended: Ended, orders: Orders) -> Outcome | None:
        """Take the end of a group in; returns the run's outcome if that is why. Raises what the run ends with."""
        step, attempt = ray.get(self._coordinator.group_ended.remote(ended.number, ended.failed))
        if len(ended.places) == 1:  # the coordinator tells of workers that have come; here is known where any would have been
            names = {f"{self._session}/{WorkerId(ended.number, rank)}" for rank in ended.failed}
            self._deaths = {name: WorkerDeath(name, ended.places[0][0], time.time()) for name in names} | self._deaths
        if ended.error is None:
            result = read_result(self._store, self._spec.run)
            return Outcome(True, result["steps"], result) if result else None
        if isinstance(ended.error, CorruptCheckpointError):
            self._claim_again()
        failure = Failure(step, attempt, ended.error, ended.detail)
        if orders.members and not attempt:
            _logger.warning("group %d did not come to join run %s (%s)", ended.number, self._spec.run, failure.summary)
            self._grows_after = time.monotonic() + _BACK_OFF_S
            return None
        self._failures.append(failure)
        if error := give_up(self._failures, self._spec.workers.max_restarts):
            raise error
        _logger.warning("a group of run %s failed at step %d (%s); %sstarting another", self._spec.run, step, failure.summary, failure.hint)
        return None

    def _finish(self, outcome: Outcome) -> Outcome:
        """Let the workers end by themselves. Of a run that finished, Ray Train is told so, which takes it two seconds."""
        deadline = time.monotonic() + _LEAVE_TIMEOUT_S
        while time.monotonic() < deadline:
            orders = self._orders()
            left = self._groups.running.keys() & orders.heard
            if not (left if outcome.finished else left - orders.gone):
                break
            self._groups.wait(_POLL_S)
        if self._is_pausing and not outcome.finished:
            note_paused(self._store, self._spec.run, outcome.step)
            return replace(outcome, is_paused=True)
        return outcome

    # --- The coordinator ----------------------------------------------------------------------------------------------

    def _orders(self) -> Orders:
        while True:
            try:
                coordinator, heard_at = self._heard
                orders: Orders = ray.get(coordinator.orders.remote(heard_at))
            except ray.exceptions.RayActorError as error:
                _logger.warning("the quorum of run %s is gone (%s); starting it again", self._spec.run, str(error).partition("\n")[0])
                self._epoch += 1
                ray.kill(self._coordinator)  # it is dead; only this frees its name
                self._coordinator = _make_coordinator(self._spec.run, _NAME_TIMEOUT_S)
                self._begin()
            else:
                self._heard = coordinator, orders.clock
                return orders

    def _begin(self) -> None:
        commits = RunLog(self._store, self._spec.run).visible_commits()
        account = read_manifest(self._store, self._spec.run, commits[0]).get("account", {}) if commits else {}
        elastic = self._spec.elastic
        beginning = Beginning(
            session=self._session,
            claimed=_as_claimed(self._claimed),
            committed=commits[0].step if commits else 0,
            min_groups=elastic.min,
            max_groups=elastic.max,
            epoch=self._epoch,
            account=account,
            rules=Rules(),
        )
        self._heard = self._coordinator, ray.get(self._coordinator.begin.remote(beginning))
        if self._epoch:
            self._tell_again()

    def _tell_again(self) -> None:
        """What the coordinator before knew from this driver alone."""
        for number in range(1, self._groups.num_started + 1):
            if number not in self._groups.running:
                self._coordinator.group_ended.remote(number)
        leaving = tuple(group.number for group in self._groups.running.values() if group.is_leaving)
        self._coordinator.release.remote(leaving)
        run = self._spec.run
        self._coordinator.ask.remote(Resize(run, self._num_groups))
        if self._stop_asked:
            self._coordinator.ask.remote(Pause(run) if self._is_pausing else Stop(run))

    def _claim_again(self) -> None:
        """Nobody holds the newest state any more: begin from the newest commit that verifies, as another incarnation."""
        self._claimed = claim_incarnation(self._store, self._spec.run, {"spec_digest": self._spec.digest})
        _logger.warning("run %s goes on from the checkpoint of step %d", self._spec.run, _base_step(self._claimed))
        ray.get(self._coordinator.claimed.remote(_as_claimed(self._claimed)))

    def _keep_leases(self) -> None:
        """Say that the driver lives, also while its main thread reads a large checkpoint."""
        while not self._ended.wait(_PULSE_S):
            coordinator, heard_at = self._heard
            try:
                clock = ray.get(coordinator.driver_is_here.remote(heard_at), timeout=_PULSE_TIMEOUT_S)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                continue  # `_orders` sees to it
            if coordinator is self._coordinator:
                self._heard = coordinator, clock


def _as_claimed(incarnation: Incarnation) -> Claimed:
    base = incarnation.base
    return Claimed(incarnation.number, base.name if base else None, _base_step(incarnation))


def _base_step(incarnation: Incarnation) -> int:
    return incarnation.base.step if incarnation.base else 0


def _make_coordinator(run: str, timeout_s: float = 0.0) -> ActorHandle:
    """The coordinator, which takes the run's name in the cluster; waits for the name of one that died. Raises `RunError`."""
    deadline = time.monotonic() + timeout_s
    options: dict[str, Any] = {"name": coordinator_name(run), "namespace": NAMESPACE}
    here = ray.get_runtime_context().get_node_id()
    if here not in draining_nodes():  # beside its driver, with which it ends: no other node that goes takes it along
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    while True:
        try:
            return ray.remote(num_cpus=0)(Coordinator).options(**options).remote()
        except ValueError as error:  # Ray's way to say that the name is taken
            if time.monotonic() > deadline:
                raise RunError(
                    f"Run {run} is being trained in this cluster already: wait for it, stop its job (`ray job list`, `ray job stop ID`), "
                    "or choose another `run` name."
                ) from error
        time.sleep(_POLL_S)


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
    """Raises `ClusterError` if nothing listens at `RAY_ADDRESS`."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not listens(address, _CONNECT_TIMEOUT_S):
        raise _no_cluster(f" at {address} (RAY_ADDRESS)")


def _no_cluster(where: str = "") -> ClusterError:
    return ClusterError(
        f"No Ray cluster answers{where}. Start one with `make up` (or `ray up cluster.yaml`), or submit with `ray job submit`."
    )


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
