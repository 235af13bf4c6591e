"""Sinks: each keeps what it is told, and none disturbs the run."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tidepool.errors import StoreUnreachableError
from tidepool.storage import ObjectStore, open_store
from tidepool.telemetry import FanOut, LogSink, MemorySink, Sink, TensorBoardSink

PREFIX = "runs/r/tensorboard/"


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty when the test begins."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def read_back(tmp_path: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a scalar as TensorBoard reads the run's folder."""
    accumulator = EventAccumulator(str(tmp_path / "store" / PREFIX))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_reads_all_flushes_of_all_incarnations_as_one_run(store: ObjectStore, tmp_path: Path, temporary: Path) -> None:
    for incarnation, steps in ((1, [1, 2, 3, 4]), (2, [3, 4, 5]), (10, [5, 6])):
        sink = TensorBoardSink(store.put_if_absent, PREFIX, f"{incarnation:08d}")
        for step in steps:
            sink.record(step, {"loss": incarnation + step / 8, "learning_rate": 0.5})
            if step % 2 == 0:
                sink.flush()
        sink.close()
    once_more = [(1, step) for step in (1, 2, 3, 4)] + [(2, step) for step in (3, 4, 5)] + [(10, step) for step in (5, 6)]
    assert read_back(tmp_path, "loss") == [(step, incarnation + step / 8) for incarnation, step in once_more]
    assert len(read_back(tmp_path, "learning_rate")) == len(once_more)
    names = [info.key.removeprefix(PREFIX) for info in store.list("")]
    parts = [(1, 1), (1, 2), (2, 1), (2, 2), (10, 1)]
    assert names == [f"events.out.tfevents.{incarnation:08d}-{part:08d}.tidepool" for incarnation, part in parts]
    assert list(temporary.iterdir()) == []


def test_without_values_nothing_is_stored_and_nothing_lies_around(store: ObjectStore, temporary: Path) -> None:
    sink = TensorBoardSink(store.put_if_absent, PREFIX, "00000001")
    sink.flush()
    sink.close()
    assert list(store.list("")) == []
    assert list(temporary.iterdir()) == []


def test_a_store_that_refuses_is_logged_and_the_run_goes_on(
    store: ObjectStore, tmp_path: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    is_up = False

    def put(key: str, path: Path) -> None:
        if not is_up:
            raise StoreUnreachableError("The store gave no answer within 60 s.")
        store.put_if_absent(key, path)

    sink = TensorBoardSink(put, PREFIX, "00000001")
    sink.record(1, {"loss": 4.0})
    sink.flush()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "could not be stored" in caplog.text
    assert "gave no answer within 60 s" in caplog.text
    assert list(temporary.iterdir()) == []
    is_up = True
    sink.record(2, {"loss": 3.0})
    sink.close()
    assert read_back(tmp_path, "loss") == [(2, 3.0)]
    assert list(temporary.iterdir()) == []


# --- The others ------------------------------------------------------------------------------------------------------


def test_memory_keeps_the_values_as_they_were() -> None:
    sink, values = MemorySink(), {"loss": 2.0}
    sink.record(1, values)
    values["loss"] = 1.0
    sink.record(2, values)
    sink.flush()
    assert sink.rows == [(1, {"loss": 2.0}), (2, {"loss": 1.0})]


def test_a_line_of_the_log_has_the_step_and_the_values(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tidepool"):
        LogSink().record(7, {"loss": 2.5, "targets_per_s": 1e5})
        LogSink().flush()
    (record,) = caplog.records
    assert record.getMessage() == "step 7"
    assert record.levelname == "INFO"
    assert record.fields == {"loss": 2.5, "targets_per_s": 1e5}  # type: ignore[attr-defined]


class Noting:
    """Notes who was called with what, in a list that several share."""

    def __init__(self, name: str, calls: list[tuple[str, str]]) -> None:
        self._name, self._calls = name, calls

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._calls.append((self._name, f"{step} {dict(values)}"))

    def flush(self) -> None:
        self._calls.append((self._name, "flush"))


def test_a_fan_out_hands_everything_to_all_in_order() -> None:
    calls: list[tuple[str, str]] = []
    sinks: list[Sink] = [Noting("a", calls), Noting("b", calls)]
    everyone = FanOut(sinks)
    sinks.clear()
    everyone.record(1, {"loss": 2.0})
    everyone.flush()
    assert calls == [("a", "1 {'loss': 2.0}"), ("b", "1 {'loss': 2.0}"), ("a", "flush"), ("b", "flush")]
