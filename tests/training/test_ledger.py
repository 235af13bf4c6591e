"""Where the wall time of a run went."""

from dataclasses import replace

import pytest

from tidepool.training.ledger import Ledger
from tidepool.training.membership import Number, Quorum, Report, WorkerId

LEADER = WorkerId(1, 0)
HELLO = Report(LEADER, 1, 1, "127.0.0.1:1")


def quorum(count: int, step: int) -> Quorum:
    return Quorum(Number(0, count), (LEADER,), "", step, None, (), 1, None, from_base=False)


def after(steps: int, spent_s: dict[str, float], sequence: int) -> Report:
    return replace(HELLO, sequence=sequence, step=steps, num_steps=steps, step_s=1.0, spent_s=spent_s)


def test_the_parts_add_up_to_the_wall_time() -> None:
    ledger = Ledger(100.0)
    ledger.note_quorum(quorum(1, 0), 110.0)
    ledger.note_report(after(0, {}, 1))
    ledger.note_report(after(8, {"step": 9.0, "exchange": 1.0, "commit": 2.0}, 2))
    account = ledger.to_json(125.0)
    assert account["goodput"] == pytest.approx(8 / 25)
    assert account["rest"] == pytest.approx({"start_s": 10.0, "commit_s": 2.0, "slow_steps_s": 2.0, "other_s": 3.0})
    assert account["useful_s"] + sum(account["rest"].values()) == pytest.approx(account["wall_s"])
    assert (account["quorum_changes"], account["recomputed_steps"]) == (0, 0)


def test_steps_that_are_computed_again_are_not_useful_twice() -> None:
    ledger = Ledger(0.0)
    ledger.note_quorum(quorum(1, 0), 0.0)
    ledger.note_report(after(0, {}, 1))
    ledger.note_report(after(8, {"step": 8.0}, 2))
    ledger.note_quorum(quorum(2, 5), 8.0)
    account = ledger.to_json(10.0)
    assert (account["quorum_changes"], account["recomputed_steps"]) == (1, 3)
    assert account["goodput"] == pytest.approx(5 / 10)
    assert account["rest"]["recompute_s"] == pytest.approx(3.0)


def test_a_later_driver_goes_on_with_the_account_of_its_base() -> None:
    ledger = Ledger(0.0)
    ledger.note_quorum(quorum(1, 0), 0.0)
    ledger.note_report(after(0, {}, 1))
    ledger.note_report(after(4, {"step": 4.0}, 2))
    again = Ledger(50.0, ledger.to_json(4.0))
    again.note_quorum(quorum(1, 4), 50.0)
    account = again.to_json(100.0)
    assert account["wall_s"] == 100.0, "the time between two drivers counts"
    assert account["goodput"] == pytest.approx(4 / 100)
    assert account["quorum_changes"] == 1
