"""Whether a failed run is started again."""

import pytest

from tidepool.errors import (
    BaseMismatchError,
    CorruptCheckpointError,
    NonFiniteError,
    RunError,
    StoreAccessError,
    SupersededError,
    TidepoolError,
    WorkerLostError,
)
from tidepool.training.restarts import Failure, give_up


def failure(step: int, error: Exception | str = "worker died", attempt: str = "0.1") -> Failure:
    return Failure(step, attempt, RuntimeError(error) if isinstance(error, str) else error, "Traceback ...")


@pytest.mark.parametrize("kind", [NonFiniteError, StoreAccessError, SupersededError, BaseMismatchError])
def test_an_error_for_a_person_ends_the_run_with_that_error(kind: type[TidepoolError]) -> None:
    error = kind("what to do")
    assert give_up([failure(3, error)], 8) is error


def test_a_dead_worker_is_replaced() -> None:
    assert give_up([failure(3)], 8) is None


def test_a_damaged_checkpoint_is_gone_around() -> None:
    assert give_up([failure(0, CorruptCheckpointError("bad bytes"))], 8) is None


def test_the_same_exception_at_the_same_step_after_a_clean_retry_is_a_bug() -> None:
    first = [failure(3, "index out of range"), failure(3, "index out of range")]
    assert give_up(first, 8) is None, "two groups that tried it together"
    error = give_up([*first, failure(3, "index out of range", "0.2")], 8)
    assert isinstance(error, RunError)
    assert "step 4" in str(error)
    assert "Traceback ..." in str(error)


def test_other_exceptions_and_other_steps_are_bad_luck() -> None:
    failures = [failure(3, "port 1"), failure(3, "port 2", "0.2"), failure(4, "port 2", "0.3")]
    assert give_up(failures, 8) is None


def test_attempts_without_a_new_step_are_bounded() -> None:
    failures = [failure(10, f"pid {n}", f"0.{n}") for n in range(3)]
    assert give_up([*failures, failure(10, "pid 9", "0.2")], 3) is None, "two groups that died together"
    error = give_up([*failures, failure(10, "pid 3", "0.3")], 3)
    assert isinstance(error, WorkerLostError)
    assert "4 times after step 10" in str(error)


def test_a_new_step_resets_the_count() -> None:
    assert give_up([failure(step, attempt=f"0.{step}") for step in range(0, 100, 10)], 1) is None


def test_no_restarts_means_none() -> None:
    assert isinstance(give_up([failure(3)], 0), WorkerLostError)


_BY_RAY = "1 worker(s) were killed due to the node running low on memory. Refer to the documentation"
_BY_KERNEL = "Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray stop --force"


@pytest.mark.parametrize(("said", "words"), [(_BY_RAY, "Ray killed a worker because its node ran low on memory"), (_BY_KERNEL, "`dmesg`")])
def test_workers_that_were_killed_for_their_memory_are_called_that_and_no_bug(said: str, words: str) -> None:
    failures = [failure(3, said, "0.1"), failure(3, said, "0.2")]
    assert give_up(failures, 2) is None
    error = give_up([*failures, failure(3, said, "0.3")], 2)
    assert isinstance(error, WorkerLostError)
    assert words in str(error)
    assert "Lower training.micro_batch_size" in str(error)
    assert "What was committed is safe" in str(error)


def test_other_failures_are_not_blamed_on_memory() -> None:
    assert failure(3, "Connection closed by peer").hint == ""
