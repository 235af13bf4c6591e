"""Logging of a process: one line per record, for people or for machines."""

import calendar
import json
import logging
import re
import time
from collections.abc import Iterator

import pytest

from tidepool.errors import StoreError
from tidepool.telemetry import LogSink, configure_logging

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The library's logger, as a new process has it."""
    monkeypatch.delenv("TIDEPOOL_LOG", raising=False)
    logger = logging.getLogger("tidepool")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    return logger


@pytest.fixture
def _far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Etc/GMT-5")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("_far_from_greenwich")
def test_text_is_one_line_with_time_in_utc_level_and_fields(capsys: Captured) -> None:
    configure_logging()
    LogSink().record(3, {"loss": 2.123456789, "targets_per_s": 41.0})
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO step 3 loss=2.12346 targets_per_s=41\n", err)
    written = time.strptime(err.split()[0], "%Y-%m-%dT%H:%M:%SZ")
    assert abs(calendar.timegm(written) - time.time()) < 60


def test_json_is_one_object_a_line(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_LOG", "json")
    configure_logging()
    LogSink().record(3, {"loss": 2.123456789})
    try:
        raise StoreError("The store is full:\nmake room.")
    except StoreError:
        logging.getLogger("tidepool.checkpoint").warning("cannot commit %s", "step 3", exc_info=True)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {"level": "INFO", "logger": "tidepool.metrics", "message": "step 3", "loss": 2.123456789}
    assert (second["level"], second["logger"], second["message"]) == ("WARNING", "tidepool.checkpoint", "cannot commit step 3")
    assert second["traceback"].startswith("Traceback")
    assert second["traceback"].endswith("StoreError: The store is full:\nmake room.")


@pytest.mark.parametrize("form", ["text", "json"])
def test_configuring_twice_gives_each_line_once(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, logger: logging.Logger, form: str
) -> None:
    monkeypatch.setenv("TIDEPOOL_LOG", form)
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)
    try:
        configure_logging()
        configure_logging()
        logging.getLogger("tidepool.training").info("committed")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().err.count("committed") == 1
    assert len(logger.handlers) == 1


def test_the_level_is_kept_and_other_peoples_loggers_are_left_alone(capsys: Captured) -> None:
    configure_logging(logging.WARNING)
    logging.getLogger("tidepool.training").info("too little to say")
    logging.getLogger("tidepool.training").warning("the tide is out")
    assert capsys.readouterr().err.endswith("WARNING the tide is out\n")
    assert logging.getLogger("somebody").getEffectiveLevel() == logging.getLogger().level
