"""A pause that is over before the driver looks again is a pause all the same."""

from types import SimpleNamespace

import pytest

from tests.training.conftest import make_run
from tidepool.storage import ObjectStore
from tidepool.training import driver
from tidepool.training.coordinator import Orders
from tidepool.training.outcome import Outcome
from tidepool.training.pauses import paused_step


@pytest.mark.parametrize("is_pausing", [True, False])
def test_the_outcome_may_come_with_the_wish(
    prepared: str, run_name: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, is_pausing: bool
) -> None:
    none = frozenset[int]()
    stopped = Outcome(False, 7, None)
    orders = Orders(0.0, none, 1, none, none, (), True, is_pausing, (), False, None, stopped)
    run = object.__new__(driver._Run)  # without a cluster
    run._spec, run._store, run._is_pausing = make_run(prepared, run_name), store, False
    run._groups = SimpleNamespace(running={})  # type: ignore[assignment]
    monkeypatch.setattr(run, "_orders", lambda: orders)
    assert run.drive(driver._StopSignal()) == Outcome(False, 7, None, is_paused=is_pausing)
    assert paused_step(store, run_name) == (7 if is_pausing else None)
