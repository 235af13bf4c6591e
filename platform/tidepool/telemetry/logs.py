"""Logging of a process: one line per record, to standard error, with the fields that `extra={"fields": {...}}` adds.

Text by default; `TIDEPOOL_LOG=json` makes each line a JSON object for machines to read.
"""

import json
import logging
import os
import sys
import time
from typing import Any


class _Formatter(logging.Formatter):
    def __init__(self, as_json: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        if not self._as_json:
            tail = " ".join(f"{key}={_short(value)}" for key, value in fields.items())
            return f"{super().format(record)} {tail}".rstrip()
        line = {"time": self.formatTime(record, self.datefmt), "level": record.levelname, "logger": record.name}
        line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | fields, default=str)


def configure_logging(level: int = logging.INFO) -> None:
    """Send the `tidepool` loggers of this process to standard error; calling it again changes nothing."""
    logger = logging.getLogger("tidepool")
    logger.setLevel(level)
    if not any(isinstance(handler.formatter, _Formatter) for handler in logger.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter(os.environ.get("TIDEPOOL_LOG") == "json"))
        logger.addHandler(handler)
        logger.propagate = False


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
