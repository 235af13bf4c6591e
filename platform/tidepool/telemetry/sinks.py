"""Where numbers about a run go: a `Sink` takes a few named values at a step.

Two methods, because that is all a step loop has to say: values, and "what you hold should be safe now". What it costs
to keep the values (a file, a store, a metrics service) is the sink's own business; it never changes them.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

_logger = logging.getLogger("tidepool.metrics")


class Sink(Protocol):
    """Takes scalar values by name at a step."""

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step, by names such as `loss` or `tokens_per_s` (units stand in the name)."""
        ...

    def flush(self) -> None:
        """Make what was recorded outlive this process, where the sink has such a place."""
        ...


class MemorySink:
    """Keeps everything, as a list of (step, values)."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def flush(self) -> None:
        """Nothing to do: the rows live as long as the process."""


class LogSink:
    """A log line for each step."""

    def record(self, step: int, values: Mapping[str, float]) -> None:
        _logger.info("step %d", step, extra={"fields": dict(values)})

    def flush(self) -> None:
        """Nothing to do: lines are written as they come."""


class FanOut:
    """Hands everything to several sinks, in order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.record(step, values)

    def flush(self) -> None:
        for sink in self._sinks:
            sink.flush()
