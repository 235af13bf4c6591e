"""A run that publishes while it goes on: which versions there are, which one its alias means, and that its bits stay what they were."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import Killed, killer, make_run, train_here
from tidepool.errors import SpecError, StoreUnreachableError
from tidepool.registry import Registry
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore
from tidepool.training.publications import Publications


def run_of(url: str, name: str, **publish: Any) -> RunSpec:
    """A run of 12 steps, published at each fourth one."""
    return make_run(url, name, training={"steps": 12}, publish={"model": f"{name}-model", "every_steps": 4} | publish)


def steps(store: ObjectStore, name: str) -> list[int]:
    return [int(version.lineage["step"]) for version in Registry(store).versions(f"{name}-model")]


def test_versions_come_while_a_run_goes_on_and_change_nothing_of_it(prepared: str, run_name: str, store: ObjectStore) -> None:
    seen: list[int] = []

    def beat(step: int, phase: str) -> bool:
        if phase == "step" and step == 11:
            seen.extend(steps(store, run_name))
        return False

    outcome = train_here(run_of(prepared, run_name), beat)
    assert seen[:1] == [4], "the first one is there before the end"
    assert steps(store, run_name) == [4, 8, 12]
    registry = Registry(store)
    assert [move.number for move in registry.history(f"{run_name}-model")] == [1, 2, 3]
    assert len({version.digest for version in registry.versions(f"{run_name}-model")}) == 3
    alone = train_here(make_run(prepared, f"{run_name}-alone", training={"steps": 12}))
    assert outcome.result is not None
    assert alone.result is not None
    assert outcome.result["weights_sha256"] == alone.result["weights_sha256"]


def test_a_worker_that_dies_publishes_each_step_once(prepared: str, run_name: str, store: ObjectStore) -> None:
    spec = run_of(prepared, run_name)
    for at_step, phase in ((4, "step"), (5, "step"), (8, "step")):
        with pytest.raises(Killed):
            train_here(spec, killer(at_step, phase))
    assert train_here(spec).finished
    assert steps(store, run_name) == [4, 8, 12]


def test_a_version_that_does_not_pass_the_gate_is_there_and_no_alias_means_it(
    prepared: str, run_name: str, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    train_here(run_of(prepared, f"{run_name}-all"))
    losses = [version.metrics["held_out_loss"] for version in Registry(store).versions(f"{run_name}-all-model")]
    assert losses[0] > losses[2], "training helps"
    with caplog.at_level(logging.WARNING, "tidepool"):
        train_here(run_of(prepared, run_name, max_held_out_loss=(losses[0] + losses[2]) / 2))
    assert steps(store, run_name) == [4, 8, 12]
    moves = [move.number for move in Registry(store).history(f"{run_name}-model")]
    assert 1 not in moves
    assert moves[-1] == 3
    assert "no alias moves" in caplog.text


def test_what_is_published_has_been_measured(prepared: str) -> None:
    with pytest.raises(SpecError, match=r"publish\.every_steps \(6\) must be a multiple of training\.evaluate_every_steps \(4\)"):
        run_of(prepared, "r", every_steps=6)


# --- One after the other ---------------------------------------------------------------------------------------------


class Slow:
    """Publishes when it may."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.published: list[tuple[int, str]] = []
        self.error: Exception | None = None

    def __call__(self, step: int, folder: Path, metrics: Mapping[str, float]) -> None:
        del metrics
        assert self.gate.wait(60)
        if self.error:
            raise self.error
        self.published.append((step, folder.read_text()))


def test_a_step_that_comes_while_the_store_is_at_work_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    publications = Publications(slow)
    exported: list[Path] = []

    def export(path: Path) -> None:
        path.write_text(f"export {len(exported)}")
        exported.append(path)

    with caplog.at_level(logging.WARNING, "tidepool"):
        for step in (4, 4, 8):
            publications.take(step, export, {})
    slow.gate.set()
    publications.settle()
    publications.take(12, export, {})
    publications.settle()
    publications.close()
    assert slow.published == [(4, "export 0"), (12, "export 1")]
    assert "step 8 is not published" in caplog.text
    assert not any(path.parent.exists() for path in exported)


def test_a_store_that_is_away_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    slow.gate.set()
    slow.error = StoreUnreachableError("away")
    publications = Publications(slow)
    with caplog.at_level(logging.WARNING, "tidepool"):
        publications.take(4, lambda path: path.mkdir(), {})
        publications.settle()
    publications.close()
    assert "step 4 is not published: away" in caplog.text
