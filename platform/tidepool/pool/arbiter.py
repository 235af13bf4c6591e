"""The arbiter as an actor: hears drivers, deployments and the cluster, has the desk decide, and answers. A shell around `pool.desk`.

Ray starts it again wherever it dies (`arbiter_handle`); it knows everything again a moment later, since all that it must know is said
to it again and again.
"""

import asyncio
import logging
import os
import secrets
import time
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError

from tidepool.messages import ClusterView, Resources, RunReport, Standing
from tidepool.pool.books import Books
from tidepool.pool.closing import Closures
from tidepool.pool.cluster import read_cluster
from tidepool.pool.demand import Demand
from tidepool.pool.desk import Desk, Wish, deployment_name
from tidepool.pool.health import Rules as HealthRules
from tidepool.pool.inspection import Inspector
from tidepool.pool.ray_jobs import RayJobs
from tidepool.pool.recording import snapshot_to_json
from tidepool.pool.rules import Rules
from tidepool.pool.telling import tell
from tidepool.telemetry.logs import configure_logging

_logger = logging.getLogger(__name__)
_HOLD_S = 0.5
"""How long a report is kept unanswered while there is nothing new to say."""
_LOOK_EVERY_S = 0.5
_BOOKS_EVERY_S = 1.0
_PATIENCE_S = 20.0
"""How long serving keeps to what it has while nothing can be decided."""
_PAUSE_S = 0.05
"""Between two decisions: what comes in meanwhile is decided on together."""


class Arbiter:
    """Runs in one event loop. Every method is short, but those that wait for something new."""

    def __init__(self, health: HealthRules | None = None) -> None:
        configure_logging()
        self._desk = Desk(Rules(), secrets.token_hex(4), time.time())
        self._books = Books(RayJobs())
        self._inspector, self._is_inspected = Inspector(health), False
        self._closures = Closures()
        self._begun_s = time.time()
        self._news = asyncio.Event()
        """Something was said that may change what is decided."""
        self._changed = asyncio.Event()
        """Something was decided: replaced each time."""
        self._demand = Demand()
        self._tasks: list[asyncio.Task[None]] = []

    def _begin(self) -> None:
        """Start to look and to decide; Ray makes the actor outside its loop, so that the first call does it."""
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(_lasting(work)) for work in (self._look, self._decide, self._keep_books)]

    # --- Runs -----------------------------------------------------------------------------------------------------------

    async def report(self, report: RunReport) -> Standing | None:
        """Take a driver's report in; answered when there is something new for anybody, or after a while.

        None where the run has been forgotten meanwhile, until the next report, or has a newer driver.
        """
        self._begin()
        before = self._desk.standing(report.run, report.session)
        if self._desk.see_run(report, time.time()):
            self._news.set()
        if self._desk.standing(report.run, report.session) == before:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _HOLD_S)
        return self._desk.standing(report.run, report.session)

    async def leave(self, run: str, session: int) -> None:
        """A run's driver ends."""
        self._begin()
        self._desk.forget(run, session)
        self._news.set()

    async def set_priority(self, run: str, priority: int) -> bool:
        """Give a run another priority; returns whether its driver is known here."""
        self._begin()
        self._news.set()
        return self._desk.set_priority(run, priority)

    # --- Serving --------------------------------------------------------------------------------------------------------

    async def deployment(
        self,
        application: str,
        deployment: str,
        project: str,
        priority: int,
        gpus: int,
        cpus: int,
        wanted: int,
        needed: int,
        num_target: int,
    ) -> int:
        """How many replicas a deployment of Serve's may have now, of which it wants `wanted` and has asked Serve for `num_target`.

        Plain values: Serve carries its policies by value, to where this library need not be.
        """
        self._begin()
        name = deployment_name(application, deployment)
        wish = Wish(project, priority, Resources(gpus, cpus), wanted, needed, time.time())
        if self._desk.see_wish(name, wish):
            self._news.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _HOLD_S)
        allowed = self._desk.allowed(name)
        if allowed is not None:
            return allowed
        return num_target if time.time() - self._begun_s < _PATIENCE_S else wanted  # who cannot see the cluster holds up nobody

    async def why_closed(self, node: str) -> str | None:
        """Why nobody is to be on a node; None if it is open. A replica that is told so says that it is unwell, and Serve replaces it."""
        self._begin()
        return self._desk.quarantined.get(node)

    # --- Whoever looks --------------------------------------------------------------------------------------------------

    async def watch(self, store_url: str) -> None:
        """Go on with the runs that are wanted in a store."""
        self._begin()
        self._books.watch(store_url)

    async def view(self) -> dict[str, Any]:
        """Who holds what and who waits, as JSON, for `tidepool queue` and `tidepool pool show`."""
        self._begin()
        desk = self._desk
        return tell(desk.snapshot, desk.waits, desk.view, desk.allowed, desk.quarantined, self._books.resubmissions())

    async def snapshot(self) -> dict[str, Any]:
        """What was decided on last, as JSON, for `tidepool pool explain`."""
        self._begin()
        return snapshot_to_json(self._desk.snapshot)

    async def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    # --- At work --------------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Ask Ray how the cluster is."""
        try:
            view = await asyncio.to_thread(read_cluster)
            view = await asyncio.to_thread(self._closures.step, view, self._desk.quarantined if self._is_inspected else None)
        except RayError as error:  # the head is busy or away: what was seen last counts
            _logger.warning("Ray does not say how the cluster is: %r", error)
        else:
            if not self._is_inspected:
                self._desk.see_cluster(view, time.time())
            await self._inspect(view)  # before the desk sees a node that has joined
            self._desk.see_cluster(view, time.time())
            self._news.set()
        await asyncio.sleep(_LOOK_EVERY_S)

    async def _keep_books(self) -> None:
        """Let the stores follow, which takes as long as they do."""
        now_s, desk = time.time(), self._desk
        for report in desk.reports:
            self._books.watch(report.store)
        if desk.is_ready(now_s):
            runs, deployments = desk.snapshot.runs, desk.snapshot.deployments
            await asyncio.to_thread(self._books.step, desk.view.runs, runs, deployments, now_s)
            if desk.quotas != self._books.quotas:
                desk.quotas = self._books.quotas
                self._news.set()
        await asyncio.sleep(_BOOKS_EVERY_S)

    async def _inspect(self, view: ClusterView) -> None:
        """Have the nodes checked that are to be, once it is known who uses which."""
        if self._desk.is_ready(time.time()):
            await asyncio.to_thread(self._inspector.step, view, self._desk.used_nodes, self._desk.reports, time.time())
            self._desk.quarantined, self._desk.unchecked = self._inspector.quarantined(), self._inspector.unchecked()
            self._is_inspected = True

    async def _decide(self) -> None:
        """Decide when there is news; tell who waits, and the autoscaler which nodes are wanted."""
        await self._news.wait()
        self._news.clear()
        now_s = time.time()
        if self._is_inspected and self._desk.is_ready(now_s):  # before that, what the arbiter before has asked for stands
            if self._desk.decide(now_s):
                changed, self._changed = self._changed, asyncio.Event()
                changed.set()
            try:
                await asyncio.to_thread(self._demand.tell, self._desk.view, self._desk.launches)
            except RayError as error:  # the next decision tells it
                _logger.warning("Ray's autoscaler cannot be told which nodes are wanted: %r", error)
        await asyncio.sleep(_PAUSE_S)


async def _lasting(work: Any) -> None:
    """Do something again and again. What it did not expect ends the process, and Ray starts another one, which learns all anew."""
    try:
        while True:
            await work()
    except Exception:
        _logger.exception("The arbiter ends and is started again")
        os._exit(1)
