"""TensorBoard event files in the object store.

Stored objects are never overwritten and event files grow, so each flush closes the local file and puts it under a name
of its own; TensorBoard reads all event files of a folder in the order of their names, as one run. Names start with the
incarnation, so those of a later one sort last and repeat the steps that were computed again.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tidepool.errors import StoreError
from tidepool.scratch import ScratchFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_logger = logging.getLogger(__name__)


class TensorBoardSink:
    """Writes scalars to `<prefix>events.out.tfevents.<writer>-<part>.tidepool`.

    `record` costs microseconds (a queue and a local file); `flush` costs one put, and may be called in another thread. A flush
    that the store refuses is logged and not tried again: a picture of the run is not worth the run.
    """

    def __init__(self, put: Callable[[str, Path], None], prefix: str, writer: str) -> None:
        """`put` stores the file at a path under a key (a store's `put_if_absent`); `writer` is unique and sorts after earlier ones."""
        self._put, self._prefix, self._writer_name = put, prefix, writer
        self._parts = 0
        self._lock = threading.Lock()
        self._folder: ScratchFolder | None = None
        self._writer: SummaryWriter | None = None

    def record(self, step: int, values: Mapping[str, float]) -> None:
        with self._lock:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # here, so that who only logs need not import torch

                self._folder = ScratchFolder("tensorboard")
                self._writer = SummaryWriter(self._folder.name)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        with self._lock:
            writer, folder = self._writer, self._folder
            if writer is None or folder is None:
                return
            self._writer = self._folder = None
            self._parts += 1
            name = f"events.out.tfevents.{self._writer_name}-{self._parts:08d}.tidepool"
        writer.close()
        try:
            for path in Path(folder.name).iterdir():
                self._put(f"{self._prefix}{name}", path)
        except StoreError as error:
            _logger.warning("metrics of the last steps could not be stored: %s", error)
        folder.cleanup()

    def close(self) -> None:
        """Flush; nothing is left on this machine."""
        self.flush()
