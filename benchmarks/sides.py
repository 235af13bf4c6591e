"""A process that answers questions, for benchmarks whose sides take turns: a JSON object a line each way.

It stands still while it is not asked: some engines keep a core busy while they wait for work, at the cost of whoever has the turn.
"""

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil

_END_S = 30


class Answering:
    """A process, and what it has started."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, question: Mapping[str, Any]) -> Any:
        """Its answer. Raises `RuntimeError` if it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._send(psutil.Process.resume)
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The side {self.name} ended with {self._process.wait()}: what it said stands above.")
        self._send(psutil.Process.suspend)
        return json.loads(line)

    def close(self) -> None:
        """End it, and what it has started."""
        assert self._process.stdin is not None
        self._send(psutil.Process.resume)
        family = self._family()
        self._process.stdin.close()
        deadline = time.monotonic() + _END_S
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        _, left = psutil.wait_procs(family, max(0.0, deadline - time.monotonic()))
        for one in left:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left)
        self._process.wait()

    def _family(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _send(self, what: Any) -> None:
        for one in self._family():
            with suppress(psutil.NoSuchProcess):
                what(one)
