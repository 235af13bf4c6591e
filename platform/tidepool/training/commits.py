"""Commits in the background: a step boundary costs a copy, and a slow or failing store costs nothing until it lags too far.

The members of a quorum take a snapshot at the same boundary, each of its part of the state; a thread of each worker puts its
parts into the store, and that of rank 0 waits for those of the others and makes the commit.

Invariants:
- What was copied is the state after one step: `settle` returns only when the state may change.
- A commit stands only when every part of the same snapshot does.
- Training goes on while the oldest snapshot that is not committed is younger than `max_lag_s`; then it waits for as long again,
  and ends with the store's error if there is one. With 0, every commit is waited for.
- A store that fails is tried again with the same bytes; nothing is dropped but what members that are gone would have had to bring.
"""

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from tidepool.checkpoint import Checkpoints, Commit, StoredObject
from tidepool.checkpoint.snapshot import Snapshot, divide
from tidepool.errors import StoreError, SupersededError
from tidepool.training.membership import Number, Quorum
from tidepool.training.sample_record import SampleRecord
from tidepool.training.state import Tensors
from tidepool.training.watch import Watch

_logger = logging.getLogger(__name__)
_PART_BYTES = 32 * 2**20
"""Less is not worth a part of its own."""
_WAITING_BYTES, _MAX_WAITING = 256 * 2**20, 8
"""How much may wait for the store in a worker's memory; one snapshot always may."""
_PART_GRACE_S = 10.0
"""How long parts of a quorum that is over are waited for."""
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.02, 0.5
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 10.0
_LEAVE_S = 2.0
_POLL_S = 0.05


@dataclass
class Taken:
    """A snapshot of this worker's part of the state after `step` steps, on its way into the store."""

    step: int
    checkpoints: Checkpoints
    quorum: Quorum
    rank: int
    num_parts: int
    buffers: dict[str, Snapshot]
    record: SampleRecord
    taken_at: float
    attempt: str
    commit: Commit | None = None
    objects: list[StoredObject] = field(default_factory=list)
    num_tries: int = 0


Finish = Callable[[Taken, Commit, list[StoredObject]], None]
"""Makes a commit of a snapshot, all objects of which are in the store. Called in the thread of rank 0."""


class Commits(Protocol):
    """What the step loop asks of whoever keeps its state."""

    @property
    def is_busy(self) -> bool:
        """There is no room for another snapshot now."""
        ...

    def newest_step(self) -> int:
        """The newest step of which a snapshot is on its way, or was committed, as far as this worker knows."""
        ...

    def take(self, step: int, state: dict[str, Tensors], record: SampleRecord, rank: int, size: int) -> None:
        """Begin a snapshot. All members of the group call it at the same boundary; who has no part in it returns at once."""
        ...

    def settle(self) -> None:
        """Return when the state may change."""
        ...

    def keep_up(self, watch: Watch) -> None:
        """At each boundary: raise what a commit failed with, and wait where it lags too far. Raises `QuorumLost` while it waits."""
        ...

    def drain(self, watch: Watch) -> None:
        """Wait until nothing is on its way any more. Raises as `keep_up`."""
        ...


class BackgroundCommits:
    """See the module's docstring. `enter` before the first step of each quorum; one for the life of a worker."""

    def __init__(self, max_lag_s: float, finish: Finish, committed_step: Callable[[], int]) -> None:
        self._max_lag_s, self._finish, self._committed_step = max_lag_s, finish, committed_step
        self._changed = threading.Condition()
        self._jobs: deque[Taken] = deque()
        self._free: list[dict[str, Snapshot]] = []
        self._num_buffers = 0
        self._max_buffers = 1
        self._trouble: StoreError | None = None
        self._failure: BaseException | None = None
        self._over_at: dict[Number, float] = {}
        self._quorum: Quorum | None = None
        self._checkpoints: Checkpoints | None = None
        self._plans: dict[int, list[list[str]]] = {}
        self._copier = ThreadPoolExecutor(1, "snapshot")
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="commits", daemon=True)
        self._thread.start()

    def enter(self, quorum: Quorum, checkpoints: Checkpoints) -> None:
        """The next snapshots are this quorum's."""
        with self._changed:
            if self._quorum is not None:
                self._over_at[self._quorum.number] = time.monotonic()
            pending = {job.quorum.number for job in self._jobs}
            self._over_at = {number: at for number, at in self._over_at.items() if number in pending}
            self._quorum, self._checkpoints, self._failure = quorum, checkpoints, None

    def close(self) -> None:
        """Let what is on its way arrive, if it takes but a moment, and end the thread; the rest is given up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs or self._failure is not None, _LEAVE_S)
            self._is_closing.set()
            self._changed.notify_all()
        self._thread.join(_LEAVE_S)
        self._copier.shutdown()

    # --- The main thread ----------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return not self._free and self._num_buffers >= self._max_buffers

    def newest_step(self) -> int:
        with self._changed:
            # A snapshot in several parts may be given up once its quorum is over.
            coming = [job.step for job in self._jobs if not job.rank and (job.num_parts == 1 or job.quorum is self._quorum)]
        return max([self._committed_step(), *coming])

    def take(self, step: int, state: dict[str, Tensors], record: SampleRecord, rank: int, size: int) -> None:
        tensors, num_parts = self._part(state, rank, size)
        if rank >= num_parts:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self.is_busy)
            if not self._free:
                self._num_buffers += 1
            buffers = self._free.pop() if self._free else {}
        for name, group in tensors.items():
            buffers.setdefault(name, Snapshot()).begin(group, self._copier)
        assert self._quorum is not None
        assert self._checkpoints is not None
        attempt = hashlib.blake2b(f"{self._quorum.number} {step}".encode(), digest_size=8).hexdigest()
        kept = {name: buffers[name] for name in tensors}
        with self._changed:
            self._jobs.append(Taken(step, self._checkpoints, self._quorum, rank, num_parts, kept, record, time.monotonic(), attempt))
            self._changed.notify_all()

    def _part(self, state: dict[str, Tensors], rank: int, size: int) -> tuple[dict[str, Tensors], int]:
        """This rank's part of the state, by group, and the number of parts; rank 0 has the history besides."""
        divided = {name: tensors for name, tensors in state.items() if name != "history"}
        sizes = {f"{name}/{key}": t.numel() * t.element_size() for name, tensors in divided.items() for key, t in tensors.items()}
        num_bytes = sum(sizes.values())
        num_parts = max(1, min(size, num_bytes // _PART_BYTES))
        if rank >= num_parts:
            return {}, num_parts
        self._max_buffers = max(1, min(_MAX_WAITING, _WAITING_BYTES * num_parts // max(1, num_bytes)))
        if num_parts not in self._plans:
            self._plans[num_parts] = divide(sizes, num_parts)
        wanted = set(self._plans[num_parts][rank])
        part = {name: {key: t for key, t in tensors.items() if f"{name}/{key}" in wanted} for name, tensors in divided.items()}
        if not rank:
            part["history"] = state["history"]
        return {name: tensors for name, tensors in part.items() if tensors}, num_parts

    def settle(self) -> None:
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs:
            for buffer in job.buffers.values():
                buffer.settle()

    def keep_up(self, watch: Watch) -> None:
        self._raise_failure()
        with self._changed:
            oldest = self._jobs[0] if self._jobs else None
        if oldest is None or time.monotonic() - oldest.taken_at < self._max_lag_s:
            return
        if self._max_lag_s:
            _logger.warning(
                "training waits: the snapshot of step %d has not been committed for %.0f s (%s)",
                *(oldest.step, time.monotonic() - oldest.taken_at, self._trouble or "the store is slow"),
            )
        self._wait_for(lambda: oldest not in self._jobs, watch)

    def drain(self, watch: Watch) -> None:
        self._wait_for(lambda: not self._jobs, watch)

    def _wait_for(self, is_done: Callable[[], bool], watch: Watch) -> None:
        deadline = time.monotonic() + self._max_lag_s
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: is_done() or self._failure is not None, _POLL_S):
                    break
                trouble = self._trouble
            watch.tick("commit")
            watch.check()  # a part that a lost worker had is waited for in vain
            if trouble is not None and time.monotonic() >= deadline:
                raise trouble
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # --- The thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._next()) is not None:
            failure: Exception | None = None
            try:
                self._bring(job)
            except Exception as error:  # noqa: BLE001 - raised by the main thread
                failure = error
            with self._changed:
                self._jobs.popleft()
                self._free.append(job.buffers)
                self._trouble = None
                if failure is not None and job.checkpoints is self._checkpoints:
                    self._failure = failure
                elif failure is not None:
                    _logger.info("the snapshot of step %d is of no use any more: %s", job.step, failure)
                self._changed.notify_all()

    def _next(self) -> Taken | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closing.is_set())
            return None if self._is_closing.is_set() else self._jobs[0]

    def _bring(self, job: Taken) -> None:
        """Try until a snapshot's part is in the store, or nobody can use it any more."""
        backoff_s = _FIRST_BACKOFF_S
        while not self._is_closing.is_set():
            try:
                self._try(job)
            except SupersededError:
                raise
            except StoreError as error:
                job.num_tries += 1
                _logger.warning(
                    "the snapshot of step %d is not in the store yet, trying again; training goes on while it is younger than %.0f s: %s",
                    *(job.step, self._max_lag_s, error),
                )
                with self._changed:
                    self._trouble = error
                    self._changed.notify_all()
                self._is_closing.wait(backoff_s)
                backoff_s = min(_MAX_BACKOFF_S, 2 * backoff_s)
            else:
                return

    def _try(self, job: Taken) -> None:
        if job.commit is None:
            job.commit = job.checkpoints.begin(job.step, job.attempt)
        of = f"-{job.rank}-of-{job.num_parts}" if job.num_parts > 1 else ""
        again = f".{job.num_tries}" if job.num_tries else ""  # a try without an answer may have put the name before
        for name in list(job.buffers)[len(job.objects) :]:
            suffix = "" if name == "history" else of
            job.objects.append(job.checkpoints.put(job.commit, f"{name}{suffix}{again}.safetensors", job.buffers[name].data()))
        if job.rank:
            job.checkpoints.note_part(job.commit, job.rank, job.objects)
            return
        objects = list(job.objects)
        for part in range(1, job.num_parts):
            found = self._wait_for_part(job, job.commit, part)
            if found is None:
                _logger.warning("the snapshot of step %d is given up: a worker that has left had part %d of it", job.step, part)
                return
            objects += found
        self._finish(job, job.commit, objects)

    def _wait_for_part(self, job: Taken, commit: Commit, part: int) -> list[StoredObject] | None:
        pause_s = _FIRST_PAUSE_S
        while (found := job.checkpoints.find_part(commit, part)) is None:
            if self._is_closing.wait(pause_s) or time.monotonic() > self._over_at.get(job.quorum.number, float("inf")) + _PART_GRACE_S:
                return None
            pause_s = min(_MAX_PAUSE_S, 1.5 * pause_s)
        return found
