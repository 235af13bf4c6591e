"""When a run's steps were completed, read from its workers' own logs, and what a fault did to them.

Each worker's standard error is a file of its Ray session. A thread reads what is new in all of them every few milliseconds and
notes the time: the same for ours and the peer, whatever they say themselves. The lines are those of `telemetry` with
`TIDEPOOL_LOG=json`: the worker of rank 0 writes one for each step, with its `loss`.

The functions after the class are pure: from a list of steps to seconds, steps and gaps.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

_READ_EVERY_S = 0.004
_LOOK_FOR_FILES_EVERY_S = 0.25
_PID = re.compile(r"worker-.*-(\d+)\.err$")
_STEP = re.compile(r"step (\d+)$")


@dataclass(frozen=True)
class Step:
    """A completed step: `number` counts from 1, `at_s` is `time.monotonic` of this machine, `pid` the worker that told it."""

    at_s: float
    number: int
    pid: int


@dataclass(frozen=True)
class Line:
    """Any other line of a worker, as it was parsed."""

    at_s: float
    pid: int
    fields: dict[str, Any]


class Timeline:
    """Follows the worker logs below `folders` from `start` to `close`. Both lists only grow."""

    def __init__(self, folders: Callable[[], Sequence[Path]]) -> None:
        """`folders` names the log folders that there are now: nodes join and leave."""
        self.steps: list[Step] = []
        self.lines: list[Line] = []
        self._looks_s: list[float] = []
        self._folders = folders
        self._files: dict[Path, BinaryIO] = {}
        self._rests: dict[Path, bytes] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="timeline", daemon=True)
        self._thread.start()

    @property
    def resolution_s(self) -> float:
        """How late a noted time may be: 99 in 100 looks at the files came within this time of the one before."""
        gaps = sorted(after - before for before, after in pairwise(self._looks_s))
        return gaps[len(gaps) * 99 // 100] if gaps else 0.0

    def close(self) -> None:
        """Stop following."""
        self._closing.set()
        self._thread.join()
        for file in self._files.values():
            file.close()

    def _follow(self) -> None:
        looked_s = float("-inf")
        while not self._closing.wait(_READ_EVERY_S):
            now = time.monotonic()
            self._looks_s.append(now)
            if now - looked_s > _LOOK_FOR_FILES_EVERY_S:
                looked_s = now
                self._look_for_files()
            for path, file in self._files.items():
                if data := file.read():
                    self._take(path, data, time.monotonic())

    def _look_for_files(self) -> None:
        for folder in self._folders():
            for path in _files_in(folder):
                if path not in self._files:
                    self._files[path], self._rests[path] = path.open("rb"), b""

    def _take(self, path: Path, data: bytes, at_s: float) -> None:
        *lines, self._rests[path] = (self._rests[path] + data).split(b"\n")
        match = _PID.search(path.name)
        assert match is not None, path
        pid = int(match[1])
        for line in lines:
            try:
                fields = json.loads(line)
            except ValueError:  # somebody else's line
                continue
            if isinstance(fields, dict):
                self._note(fields, pid, at_s)

    def _note(self, fields: dict[str, Any], pid: int, at_s: float) -> None:
        step = _STEP.match(str(fields.get("message")))
        if step is not None and "loss" in fields:
            self.steps.append(Step(at_s, int(step[1]), pid))
        else:
            self.lines.append(Line(at_s, pid, fields))


def _files_in(folder: Path) -> list[Path]:
    try:
        return list(folder.glob("worker-*.err"))
    except FileNotFoundError:  # who connects to Ray makes its link to the newest session anew: the next look finds it
        return []


def completed(steps: Sequence[Step], at_s: float) -> int:
    """The highest step that was completed by a time."""
    return max((step.number for step in steps if step.at_s <= at_s), default=0)


def seconds_to_new_step(steps: Sequence[Step], from_s: float) -> float | None:
    """From a time to the first step that had not been completed by then; None if there is none yet."""
    before = completed(steps, from_s)
    return next((step.at_s - from_s for step in steps if step.at_s > from_s and step.number > before), None)


def steps_redone(steps: Sequence[Step], from_s: float) -> int:
    """How many of the steps that had been completed by a time were taken again after it."""
    before = completed(steps, from_s)
    return len({step.number for step in steps if step.at_s > from_s and step.number <= before})


def longest_pause_s(steps: Sequence[Step], from_s: float, to_s: float) -> float:
    """The longest time without a step, new or not, between the last step before `from_s` and the first one after `to_s`."""
    times = [step.at_s for step in steps]
    first = max((at_s for at_s in times if at_s <= from_s), default=from_s)
    last = min((at_s for at_s in times if at_s >= to_s), default=to_s)
    within = [first, *(at_s for at_s in times if first < at_s < last), last]
    return max(after - before for before, after in pairwise(within))


def usual_step_s(steps: Sequence[Step]) -> list[float]:
    """The times from step to step."""
    return [after.at_s - before.at_s for before, after in pairwise(steps)]
