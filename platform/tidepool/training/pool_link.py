"""What a driver tells the arbiter of its run, and is told. A shell: a question is open nearly always, and the newest answer counts."""

import logging
import math
import time
from collections.abc import Collection
from dataclasses import replace

import ray

from tidepool.arbiter_handle import find_arbiter
from tidepool.messages import Account, Resources, RunReport, Standing
from tidepool.run_queue import QueuedRun
from tidepool.specs import RunSpec, WorkersSpec

_logger = logging.getLogger(__name__)
_LEAVE_TIMEOUT_S = 5


class PoolLink:
    """One driver's. An arbiter that dies is replaced by Ray; until it answers again, the run keeps what it has."""

    def __init__(self) -> None:
        self._arbiter = find_arbiter()
        self._open: ray.ObjectRef | None = None
        self._told: RunReport | None = None
        self._standing: Standing | None = None
        self._reason = ""

    @property
    def open(self) -> Collection["ray.ObjectRef"]:
        """The answer that is waited for."""
        return [self._open] if self._open is not None else []

    def exchange(self, report: RunReport) -> Standing | None:
        """Tell how the run stands; returns the newest answer, None before there is any."""
        if self._open is not None and ray.wait([self._open], timeout=0)[0]:
            self._take(self._open)
            self._open = None
        if self._open is None or report != self._told:
            self._told = report
            account = self._standing.account if self._standing else report.account
            priority = self._standing.priority if self._standing else report.priority
            self._open = self._arbiter.report.remote(replace(report, account=account, priority=priority))
        return self._standing

    def _take(self, answer: "ray.ObjectRef") -> None:
        try:
            standing: Standing | None = ray.get(answer)
        except ray.exceptions.RayActorError as error:
            _logger.warning("the arbiter is away (%s)", str(error).partition("\n")[0])
            self._arbiter = find_arbiter()
            return
        if standing is None:
            return  # the next report tells it all again
        self._standing = standing
        reason = f"place {standing.place} of {standing.num_queued} in the queue: {standing.reason}" if standing.place else ""
        if reason and reason != self._reason:
            _logger.info("waiting, %s", reason)
        self._reason = reason

    def close(self, run: str, session: int) -> None:
        """Tell that the run leaves; the arbiter would notice, too."""
        ray.wait([self._arbiter.leave.remote(run, session)], timeout=_LEAVE_TIMEOUT_S)


def first_report(spec: RunSpec, queued: QueuedRun, priority: int | None) -> RunReport:
    """What a run is to the pool before it has anything. `priority`: what a person has given it in place of its spec's."""
    pool = spec.pool
    return RunReport(
        run=spec.run,
        session=queued.incarnation,
        store=spec.store,
        project=pool.project,
        tier=pool.tier,
        priority=pool.priority if priority is None else priority,
        min_groups=spec.elastic.min,
        max_groups=spec.elastic.max,
        shards=spec.training.num_shards,
        workers_per_group=spec.workers.num_workers,
        worker=whole(spec.workers),
        labels=frozenset(pool.labels),
        account=Account(queued.submitted_s, queued.submitted_s, as_of_s=time.time()),
    )


def whole(workers: WorkersSpec) -> Resources:
    """What the pool counts for a worker: a part of a GPU or CPU as a whole one."""
    return Resources(math.ceil(workers.gpus_per_worker), math.ceil(workers.cpus_per_worker))
