"""Metrics and logs. Knows no Ray: a shell that has a metrics service of its own hands in a `Sink` for it."""

from tidepool.telemetry.logs import configure_logging
from tidepool.telemetry.sinks import FanOut, LogSink, MemorySink, Sink
from tidepool.telemetry.tensorboard import TensorBoardSink

__all__ = ["FanOut", "LogSink", "MemorySink", "Sink", "TensorBoardSink", "configure_logging"]
