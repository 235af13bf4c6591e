"""Publishing while training goes on: the export is made at a step boundary, the rest in a thread of its own.

Invariants:
- One publication is under way at a time; where the next one is due before it has ended, that one is left out, with a warning.
- A publication that fails for the store ends nothing: the next one is as good.
- Publishing a step again (a worker died in between) gives the same version: the registry sees to it.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tidepool.errors import RegistryError, StoreError
from tidepool.scratch import ScratchFolder

_logger = logging.getLogger(__name__)

Publish = Callable[[int, Path, Mapping[str, float]], None]
"""Publishes what a folder holds: the step, the folder, the metrics."""


class Publications:
    """Those of one worker."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._thread = ThreadPoolExecutor(1, "publication")
        self._last: Future[None] | None = None
        self._step = 0

    def take(self, step: int, export: Callable[[Path], None], metrics: Mapping[str, float]) -> None:
        """Export now, and publish meanwhile; nothing if this step was taken before (its quorum has changed since)."""
        if step == self._step:
            return
        if self._last is not None and not self._last.done():
            _logger.warning("step %d is not published: the store is still at work on step %d", step, self._step)
            return
        self._step = step
        folder = ScratchFolder("publication")
        try:
            export(Path(folder.name) / "export")
        except BaseException:
            folder.cleanup()
            raise
        self._last = self._thread.submit(self._run, step, folder, metrics)

    def settle(self) -> None:
        """Wait for the publication that is under way."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """End the thread after what it is doing."""
        self._thread.shutdown()

    def _run(self, step: int, folder: ScratchFolder, metrics: Mapping[str, float]) -> None:
        try:
            self._publish(step, Path(folder.name) / "export", metrics)
        except (StoreError, RegistryError) as error:
            _logger.warning("step %d is not published: %s", step, error)
        finally:
            folder.cleanup()
