"""One worker's side of its run's quorum: its reports, the directives that answer them, its lease. Knows no Ray.

A thread of its own reports, so that a worker is heard while its main thread computes; how a report reaches the quorum is
handed in. The main thread says where it is, waits for quorums, and asks before what cannot be taken back.

Invariants:
- Reports go out one after the other, each with a higher sequence number; a directive that is older than one taken in is ignored,
  and so is one of an earlier quorum actor.
- `check` returns only while the quorum is not over and the lease holds. A lease counts from when the report was *sent*.
"""

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

import torch

from tidepool.training.group import Group, LocalGroup, QuorumLost
from tidepool.training.membership import NONE, Committed, Directive, Number, Quorum, Report, WorkerId
from tidepool.training.process_group import MeetingPoint
from tidepool.training.quorum import Rules
from tidepool.training.straggling import WINDOW
from tidepool.training.watch import Watch, Wishes

_logger = logging.getLogger(__name__)
_BEAT_S = 0.2
_FRESH_S = 5.0

Call = Callable[[Report], Directive]
"""Hands a report to the quorum; raises `OSError` where it cannot be reached now."""


class Membership(Watch, Protocol):
    """What one worker's part of a run needs besides a `Watch`: to come into a quorum, to meet its peers, to be done with it."""

    worker: WorkerId

    def wait_for_quorum(self) -> Quorum | None:
        """Leave the last quorum, if it was not left yet, and wait for the next; None if this worker is no longer wanted."""
        ...

    def connect(self, quorum: Quorum, workers: Sequence[WorkerId], purpose: str) -> Group:
        """A group of some workers of a quorum, of which this is one. Raises `QuorumLost`."""
        ...

    def note_lost(self, reason: str) -> None:
        """The quorum was lost, and why; goes into the next report."""
        ...

    def note_commit(self, incarnation: int, step: int) -> None:
        """This worker has committed a step."""
        ...

    def check_anew(self) -> None:
        """As `check`, by what the quorum says now."""
        ...


class Alone:
    """The membership of a worker whose quorum is itself. `beat(completed steps, phase)` may ask to stop."""

    def __init__(self, incarnation: int, base: str | None, base_step: int, beat: Callable[[int, str], bool] = lambda *_: False) -> None:
        self.worker = WorkerId(0, 0)
        source = self.worker if base else None
        self._quorum = Quorum(Number(0, 1), (self.worker,), "", base_step, source, (), incarnation, base, from_base=True)
        self._beat, self._step, self._committed, self._stop = beat, base_step, base_step, False

    def tick(self, phase: str) -> None:
        self._stop = self._beat(self._step, phase) or self._stop

    def holds(self, step: int | None, digest: str, shard_s: float = 0.0) -> None:
        self._step = self._step if step is None else step

    def check(self) -> None:
        """Nobody can take this quorum away."""

    def wishes(self) -> Wishes:
        return Wishes(stop=self._stop)

    def committed_step(self) -> int:
        return self._committed

    def wait_for_quorum(self) -> Quorum:
        return self._quorum

    def connect(self, quorum: Quorum, workers: Sequence[WorkerId], purpose: str) -> Group:
        return LocalGroup()

    def note_lost(self, reason: str) -> None:
        raise AssertionError(reason)

    def note_commit(self, incarnation: int, step: int) -> None:
        self._committed = step

    def check_anew(self) -> None:
        """Nobody can take this quorum away."""


class Member:
    """The membership of a worker among others; a context manager, in which it reports."""

    def __init__(self, hello: Report, meeting_point: MeetingPoint, device: torch.device, call: Call, rules: Rules) -> None:
        """`hello` is the first report, with what does not change in it."""
        self.worker = hello.worker
        self._meeting_point, self._device, self._call, self._rules = meeting_point, device, call, rules
        self._changed = threading.Condition()
        self._report = replace(hello, address=meeting_point.address)
        self._directive = Directive(sequence=-1, epoch=-1)
        self._over, self._committed, self._leased_until = NONE, Committed(0, 0), 0.0
        self._answered_at = 0.0
        self._phase_since = self._step_at = time.monotonic()
        self._durations_s: deque[float] = deque(maxlen=50)
        self._shards_s: deque[float] = deque(maxlen=WINDOW)
        self._wake = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._report_on, name="member", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.tick("gone")
        self._is_closing = True
        self._wake.set()
        self._thread.join(self._rules.lease_s)

    # --- What the main thread says ------------------------------------------------------------------------------------

    def tick(self, phase: str) -> None:
        now = time.monotonic()
        with self._changed:
            last, took_s = self._report.phase, now - self._phase_since
            slowest_s, spent_s = self._report.slowest_s, self._report.spent_s
            if took_s > slowest_s.get(last, 0.0):
                slowest_s = {**slowest_s, last: took_s}
            spent_s = {**spent_s, last: spent_s.get(last, 0.0) + took_s}
            progress = self._report.progress + 1
            self._report = replace(self._report, phase=phase, progress=progress, slowest_s=slowest_s, spent_s=spent_s)
            self._phase_since = now
            if last not in ("step", "exchange"):
                self._step_at = now

    def holds(self, step: int | None, digest: str, shard_s: float = 0.0) -> None:
        now = time.monotonic()
        with self._changed:
            self._report = replace(self._report, step=step, digest=digest)
            if step is None or self._report.phase != "step":
                return
            self._durations_s.append(now - self._step_at)
            self._step_at = now
            self._shards_s.append(shard_s)
            usual_s = statistics.median(self._shards_s) if len(self._shards_s) == WINDOW else 0.0
            num_steps, step_s = self._report.num_steps + 1, statistics.median(self._durations_s)
            self._report = replace(self._report, num_steps=num_steps, step_s=step_s, shard_s=usual_s)

    def note_lost(self, reason: str) -> None:
        with self._changed:
            self._report = replace(self._report, is_active=False, broken=reason)

    def note_commit(self, incarnation: int, step: int) -> None:
        with self._changed:
            self._committed = max(self._committed, Committed(incarnation, step))
            self._report = replace(self._report, committed=self._committed)

    # --- What the main thread asks ------------------------------------------------------------------------------------

    def wishes(self) -> Wishes:
        return Wishes(self._directive.stop, self._directive.change, self._directive.commit)

    def committed_step(self) -> int:
        return self._committed.step

    def wait_for_quorum(self) -> Quorum | None:
        self.tick("wait")
        with self._changed:
            self._report = replace(self._report, is_active=False)
            self._wake.set()
            while (quorum := self._next_quorum()) is None:
                if self._directive.leave:
                    return None
                self._changed.wait()
            self._report = replace(self._report, quorum=quorum, is_active=True, broken="")
            self._durations_s.clear()
        self.tick("connect")
        self._wake.set()
        return quorum

    def _next_quorum(self) -> Quorum | None:
        quorum = self._directive.quorum
        entered = self._report.quorum.number if self._report.quorum else NONE
        return quorum if quorum is not None and quorum.number > max(entered, self._over) else None

    def check(self) -> None:
        quorum = self._report.quorum
        assert quorum is not None
        with self._changed:
            phase = self._report.phase
            while self._over < quorum.number and not self._directive.leave and time.monotonic() >= self._leased_until:
                self.tick("exchange")  # it is others that are waited for
                self._changed.wait()
            if self._over >= quorum.number:
                raise QuorumLost(f"quorum {quorum.number} is over")
            if self._directive.leave:
                raise QuorumLost("this worker was released, and its step is long")
            if phase != self._report.phase:
                self.tick(phase)

    def check_anew(self) -> None:
        asked_at = time.monotonic()
        self._wake.set()
        with self._changed:
            self._changed.wait_for(lambda: self._answered_at > asked_at, _FRESH_S)
        self.check()

    def connect(self, quorum: Quorum, workers: Sequence[WorkerId], purpose: str) -> Group:
        if len(workers) == 1:
            return LocalGroup()
        rank, name = workers.index(self.worker), f"{quorum.incarnation}/{quorum.number}/{purpose}"
        return self._meeting_point.connect(name, quorum.address, rank, len(workers), self._device, self.check)

    # --- The reporting thread -----------------------------------------------------------------------------------------

    def _report_on(self) -> None:
        sequence, is_lost, is_last = 0, False, False
        while not is_last:
            is_last = self._is_closing  # read before the report is made: the last one says what came last
            sequence += 1
            self._wake.clear()
            with self._changed:
                report = replace(self._report, sequence=sequence, over=self._over)
            sent_at = time.monotonic()
            try:
                directive = self._call(report)
            except OSError as error:
                if not is_lost:
                    _logger.warning("worker %s cannot reach its quorum (%s); it goes on as long as its lease holds", self.worker, error)
                is_lost = True
            else:
                is_lost = False
                self._take(directive, sent_at)
            if not is_last:
                self._wake.wait(_BEAT_S)

    def _take(self, directive: Directive, sent_at: float) -> None:
        with self._changed:
            if (directive.epoch, directive.sequence) < (self._directive.epoch, self._directive.sequence):
                return
            self._directive, self._answered_at = directive, sent_at
            self._over = max(self._over, directive.over)
            self._committed = max(self._committed, directive.committed)
            if directive.is_leased:
                self._leased_until = max(self._leased_until, sent_at + self._rules.lease_s)
            self._changed.notify_all()
