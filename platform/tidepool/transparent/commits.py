"""When a running script is committed, and how: a copy at an optimizer step, the upload beside the next ones.

Invariants:
- A commit is made of one step's snapshot, by the protocol in `tidepool.checkpoint`: whatever dies when, the last one is whole.
- A snapshot waits for a step after which no gradient can be taken through what came before, for `_PATIENCE` steps.
- A store that fails costs a warning while the script runs. A writer that was overtaken ends it at the next step.
"""

import logging
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from tidepool.checkpoint import Checkpoints, Commit
from tidepool.checkpoint.snapshot import Snapshot
from tidepool.errors import StoreError
from tidepool.transparent.graphs import pending_graphs

_logger = logging.getLogger(__name__)
_PATIENCE = 64
STOPPED = 128 + 15


class Commits:
    """Commits the script behind `parts` after `every_s` seconds, or after `every_steps` steps where that is given.

    By time, a step that is due while a commit is on its way goes without; by steps, it waits, so that the same steps are committed.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        parts: Callable[[], dict[str, dict[str, Tensor]]],
        every_s: float,
        every_steps: int | None,
        keep: int,
    ) -> None:
        self._checkpoints, self._parts, self._keep = checkpoints, parts, keep
        self._every_s, self._every_steps = every_s, every_steps
        self._committed_at, self._committed_step = time.monotonic(), 0
        self._waited = 0
        self._executor = ThreadPoolExecutor(1, "commits")
        self._snapshots: dict[str, Snapshot] = {}
        self._on_its_way: Future[None] | None = None
        self.is_stop_wished = False

    def arrived(self, num_steps: int) -> None:
        """A replay ended at this step, which is committed."""
        self._committed_at, self._committed_step = time.monotonic(), num_steps

    def after_step(self, num_steps: int) -> None:
        """Commit if it is time to; end the process if that is wished. Raises `StoreError` if it was and failed, `SupersededError`."""
        if self._on_its_way is not None and self._on_its_way.done():
            self._settle()
        can_wait = self._every_steps is None and not self.is_stop_wished
        if self.is_stop_wished or (self._is_due(num_steps) and not (can_wait and self._on_its_way is not None)):
            self._commit(num_steps)

    def close(self) -> None:
        """Wait for a commit that is on its way."""
        if self._on_its_way is not None:
            self._settle()
        self._executor.shutdown()

    def _is_due(self, num_steps: int) -> bool:
        if self._every_steps is not None:
            return num_steps - self._committed_step >= self._every_steps
        return time.monotonic() - self._committed_at >= self._every_s

    def _commit(self, num_steps: int) -> None:
        pending = len(pending_graphs())
        if pending and self._waited < _PATIENCE:
            self._waited += 1
            return
        if pending:
            _logger.warning(
                "step %d is committed although %d tensors still have a graph that no backward() has used; going on from it fails if one "
                "does later. Compute under torch.no_grad() what needs no gradient.", num_steps, pending,
            )  # fmt: skip
        if self._on_its_way is not None:
            self._settle()
        self._waited = 0
        self._committed_at, self._committed_step = time.monotonic(), num_steps
        data = self._copy()
        self._on_its_way = self._executor.submit(self._put, num_steps, data)
        if self.is_stop_wished:
            self._on_its_way.result()
            _logger.warning("stopped after step %d, which is committed", num_steps)
            sys.exit(STOPPED)

    def _copy(self) -> dict[str, memoryview]:
        data = {}
        with ThreadPoolExecutor(1) as executor:
            for name, tensors in self._parts().items():
                snapshot = self._snapshots.setdefault(name, Snapshot())
                snapshot.begin(tensors, executor)
                data[name] = snapshot.data()
        return data

    def _put(self, num_steps: int, data: dict[str, memoryview]) -> None:
        commit: Commit = self._checkpoints.begin(num_steps, uuid.uuid4().hex[:16])
        objects: list[dict[str, Any]] = [self._checkpoints.put(commit, f"{name}.safetensors", part) for name, part in data.items()]
        self._checkpoints.commit(commit, objects, {})
        _logger.warning("committed step %d", num_steps)
        self._checkpoints.retain(self._keep)

    def _settle(self) -> None:
        assert self._on_its_way is not None
        future, self._on_its_way = self._on_its_way, None
        try:
            future.result()
        except StoreError as error:
            _logger.warning("a commit failed, the next one counts: %s", error)
