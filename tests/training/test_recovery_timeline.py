"""What `benchmarks/recovery.py` reads off the steps of a run."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.recovery_timeline import Step, Timeline, longest_pause_s, seconds_to_new_step, steps_redone, usual_step_s


def steps(*pairs: tuple[float, int]) -> list[Step]:
    return [Step(at_s, number, pid=1) for at_s, number in pairs]


RESTARTED = steps((0.0, 1), (0.1, 2), (0.2, 3), (9.0, 2), (9.1, 3), (9.2, 4))


def test_a_recovery_ends_with_a_step_that_nobody_had_completed() -> None:
    assert seconds_to_new_step(RESTARTED, 0.25) == pytest.approx(8.95)
    assert seconds_to_new_step(RESTARTED[:5], 0.25) is None


def test_steps_taken_again_are_counted_once_however_often() -> None:
    assert steps_redone(RESTARTED, 0.25) == 2
    assert steps_redone([*RESTARTED, *steps((20.0, 3), (20.1, 4), (20.2, 5))], 0.25) == 2
    assert steps_redone(RESTARTED[:3] + steps((0.4, 4)), 0.25) == 0


def test_a_pause_reaches_from_the_last_step_before_to_the_first_one_after() -> None:
    assert longest_pause_s(RESTARTED, 0.25, 9.15) == pytest.approx(8.8)
    assert longest_pause_s(RESTARTED, 5.0, 6.0) == pytest.approx(8.8)
    assert longest_pause_s(RESTARTED, 0.0, 0.15) == pytest.approx(0.1)
    assert longest_pause_s([], 1.0, 3.0) == pytest.approx(2.0)


def test_the_usual_time_of_a_step_is_from_one_to_the_next() -> None:
    assert usual_step_s(RESTARTED[:3]) == pytest.approx([0.1, 0.1])


def test_steps_and_other_lines_are_read_from_logs_as_they_grow(tmp_path: Path) -> None:
    timeline = Timeline(lambda: [tmp_path])
    try:
        with (tmp_path / "worker-ab-01000000-77.err").open("w") as log:
            log.write(
                "not ours\n" + json.dumps({"message": "step 4", "loss": 1.0}) + "\n" + json.dumps({"message": "step 4", "held_out_loss": 1})
            )
            log.flush()
            wait_for(lambda: len(timeline.steps) == 1)
            log.write("\n" + json.dumps({"message": "step 5", "loss": 1.0}) + "\n")
            log.flush()
            wait_for(lambda: len(timeline.steps) == 2)
    finally:
        timeline.close()
    assert [(step.number, step.pid) for step in timeline.steps] == [(4, 77), (5, 77)]
    assert [line.fields.get("held_out_loss") for line in timeline.lines] == [1]
    assert timeline.steps[0].at_s < timeline.steps[1].at_s < time.monotonic()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
