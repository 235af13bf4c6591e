"""What the pool keeps in object stores: in its own what projects use and may hold, and in every one that it has heard of the list of runs.

A shell around stores: `step` blocks as long as they do, and the arbiter calls it in a thread. A store that does not answer costs
nothing but what is in it: the quotas that were read last count, and what was used is written later.
"""

import logging
import os
from collections.abc import Iterable
from typing import Any

from tidepool.errors import StoreError
from tidepool.messages import Deployment, Quota, Run
from tidepool.pool.quotas import read_quotas
from tidepool.pool.resubmitter import Jobs, Resubmitter
from tidepool.pool.usage_log import UsageLog, holdings
from tidepool.specs import STORE_VARIABLE
from tidepool.storage import ObjectStore, open_store

_logger = logging.getLogger(__name__)
_QUOTAS_EVERY_S = 10.0


class Books:
    """The books of one pool. Its own store is the one of the nodes' environment, or the first that it hears of."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._urls: list[str] = [url] if (url := os.environ.get(STORE_VARIABLE)) else []
        self._resubmitters: dict[str, Resubmitter] = {}
        self._own: tuple[ObjectStore, UsageLog] | None = None
        self._quotas_s = float("-inf")
        self._problem = ""
        self.quotas: tuple[Quota, ...] = ()

    def watch(self, store_url: str) -> None:
        """Go on with the runs that are wanted in this store, too."""
        if store_url not in self._urls:
            self._urls.append(store_url)

    def step(self, living_runs: frozenset[str], runs: Iterable[Run], deployments: Iterable[Deployment], now_s: float) -> None:
        """Bring the books up to date: `living_runs` have a driver, and what `runs` and `deployments` hold is used from now on."""
        for url in list(self._urls):
            if url not in self._resubmitters and not self._open(url):
                continue
            self._resubmitters[url].step(living_runs, now_s)
        if self._own is None:
            return
        store, usage = self._own
        usage.step(holdings(runs, deployments), now_s)
        if now_s - self._quotas_s >= _QUOTAS_EVERY_S:
            self._quotas_s = now_s
            try:
                self.quotas = read_quotas(store)
            except StoreError as error:
                self._say(f"Quotas cannot be read, those known before count: {error}")

    def resubmissions(self) -> list[dict[str, Any]]:
        """See `Resubmitter.state`."""
        return [told for one in list(self._resubmitters.values()) for told in one.state()]

    def _open(self, url: str) -> bool:
        try:
            store = open_store(url)
        except StoreError as error:
            self._say(f"The store {url} cannot be opened: {error}")
            return False
        self._resubmitters[url] = Resubmitter(store, self._jobs)
        if self._own is None:
            self._own = store, UsageLog(store)
        return True

    def _say(self, problem: str) -> None:
        if problem != self._problem:  # once, not every second
            _logger.warning("%s", problem)
        self._problem = problem
