"""Commits in the background: whose parts are where, what a store that is slow, fails or was taken over costs, and who says so."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tidepool.checkpoint import Checkpoints, Commit, Incarnation, RunLog, StoredObject, claim_incarnation, read_manifest, verify
from tidepool.errors import StoreUnreachableError, SupersededError
from tidepool.storage import ObjectStore, open_store
from tidepool.training import commits as module
from tidepool.training.commits import BackgroundCommits, Taken
from tidepool.training.group import QuorumLost
from tidepool.training.member import Alone
from tidepool.training.membership import Number, Quorum, WorkerId
from tidepool.training.sample_record import SampleRecord
from tidepool.training.state import Tensors

RUN = "r"


def state(step: int) -> dict[str, Tensors]:
    return {
        "model": {"a": torch.full((300,), float(step)), "b": torch.full((200,), float(step))},
        "optimizer": {"a.exp_avg": torch.full((300,), -float(step)), "a.step": torch.tensor(float(step))},
        "history": {"loss": torch.arange(step, dtype=torch.float64)},
    }


def quorum(count: int) -> Quorum:
    return Quorum(Number(0, count), (WorkerId(1, 0), WorkerId(2, 0)), "", 0, None, (), 1, None, from_base=True)


class Faulty:
    """A store whose puts of data objects wait for `may_put`, and fail so many times."""

    def __init__(self, store: ObjectStore, failures: int = 0) -> None:
        self._store, self.failures, self.may_put = store, failures, threading.Event()
        self.may_put.set()
        self.url = store.url

    def put_if_absent(self, key: str, data: Any) -> None:
        if key.endswith(".safetensors"):
            self.may_put.wait()
            if self.failures:
                self.failures -= 1
                self._store.put_if_absent(key, data)  # the answer is lost
                raise StoreUnreachableError("the store is away")
        self._store.put_if_absent(key, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class Worker:
    """One rank's commits."""

    def __init__(self, store: Any, rank: int, size: int, max_lag_s: float) -> None:
        self.rank, self.size, self.committed, self.ticks = rank, size, 0, 0
        self.watch = Alone(1, None, 0, self._beat)
        self._checkpoints = Checkpoints(store, RUN, newest_incarnation(store) if rank else claim_incarnation(store, RUN, {}))
        self.commits = BackgroundCommits(max_lag_s, self._finish, lambda: self.committed)
        self.enter(1)

    def enter(self, count: int) -> None:
        self.commits.enter(quorum(count), self._checkpoints)

    def _finish(self, taken: Taken, commit: Commit, objects: list[StoredObject]) -> None:
        taken.checkpoints.commit(commit, objects, {})
        self.committed = commit.step

    def take(self, step: int) -> None:
        self.commits.take(step, state(step), SampleRecord(), self.rank, self.size)

    def _beat(self, _step: int, phase: str) -> bool:
        assert phase == "commit"
        self.ticks += 1
        return False


def newest_incarnation(store: Any) -> Incarnation:
    return Incarnation(RunLog(store, RUN).newest_incarnation(), None)


Start = Callable[..., Worker]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(module, "_LEAVE_S", 0.2)
    monkeypatch.setattr(module, "_FIRST_BACKOFF_S", 0.01)
    started: list[Worker] = []

    def start(store: Any, rank: int = 0, size: int = 1, max_lag_s: float = 300) -> Worker:
        started.append(Worker(store, rank, size, max_lag_s))
        return started[-1]

    yield start
    for worker in started:
        worker.commits.close()


@pytest.fixture
def faulty(tmp_path: Path) -> Faulty:
    return Faulty(open_store((tmp_path / "store").as_uri()))


def check_committed(store: Any, step: int) -> Commit:
    newest = RunLog(store, RUN).visible_commits()[0]
    assert newest.step == step
    verify(store, RUN, newest)
    checkpoints = Checkpoints(store, RUN, newest_incarnation(store))
    for name, tensors in state(step).items():
        restored = checkpoints.restore(newest, name)
        assert restored.keys() == tensors.keys()
        assert all(torch.equal(restored[key], tensor) for key, tensor in tensors.items()), name
    return newest


def test_training_goes_on_while_a_snapshot_is_on_its_way(start: Start, faulty: Faulty) -> None:
    worker = start(faulty)
    faulty.may_put.clear()
    worker.take(5)
    worker.commits.settle()
    worker.commits.keep_up(worker.watch)
    assert (worker.commits.newest_step(), worker.committed, worker.ticks) == (5, 0, 0)
    faulty.may_put.set()
    worker.commits.drain(worker.watch)
    assert worker.committed == 5
    check_committed(faulty, 5)


def test_so_many_snapshots_wait_as_have_room(start: Start, faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 3)
    worker = start(faulty)
    faulty.may_put.clear()
    for step in (1, 2, 3):
        assert not worker.commits.is_busy
        worker.take(step)
    assert worker.commits.is_busy
    faulty.may_put.set()
    worker.commits.drain(worker.watch)
    assert not worker.commits.is_busy
    assert [commit.step for commit in RunLog(faulty, RUN).visible_commits()] == [3, 2, 1]
    check_committed(faulty, 3)


def test_with_no_lag_every_commit_is_waited_for(start: Start, faulty: Faulty) -> None:
    worker = start(faulty, max_lag_s=0)
    for step in (1, 2, 3):
        worker.take(step)
        worker.commits.keep_up(worker.watch)
        assert worker.committed == step


def test_a_store_that_fails_for_a_while_costs_nothing(start: Start, faulty: Faulty, caplog: pytest.LogCaptureFixture) -> None:
    worker = start(faulty)
    faulty.failures = 3
    worker.take(5)
    worker.commits.drain(worker.watch)
    check_committed(faulty, 5)
    assert "step 5 is not in the store yet, trying again" in caplog.text


def test_a_store_that_fails_for_longer_than_the_lag_is_waited_for_and_then_said(
    start: Start, faulty: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(faulty, max_lag_s=0.3)
    faulty.failures = 10**6
    worker.take(5)
    worker.commits.keep_up(worker.watch)
    with worker.commits._changed:
        assert worker.commits._changed.wait_for(lambda: worker.commits._trouble is not None, 30)
        worker.commits._jobs[0].taken_at -= 5  # it has got old
    with pytest.raises(StoreUnreachableError, match="the store is away"):
        worker.commits.keep_up(worker.watch)
    assert worker.ticks >= 3, "it waited, and was seen to"
    assert "training waits: the snapshot of step 5 has not been committed for 5 s (the store is away)" in caplog.text
    assert worker.committed == 0


def test_the_members_share_the_work_and_rank_0_commits(start: Start, faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART_BYTES", 1000)
    first, second = start(faulty, 0, 2), start(faulty, 1, 2)
    first.take(7)
    assert not RunLog(faulty, RUN).visible_commits()
    second.take(7)
    for worker in (second, first):
        worker.commits.drain(worker.watch)
    commit = check_committed(faulty, 7)
    sizes = {entry["name"]: entry["size_bytes"] for entry in read_manifest(faulty, RUN, commit)["objects"]}
    assert sizes.keys() == {"history.safetensors", "model-0-of-2.safetensors", "optimizer-1-of-2.safetensors"}


def test_a_small_state_is_not_divided(start: Start, faulty: Faulty) -> None:
    first, second = start(faulty, 0, 2), start(faulty, 1, 2)
    second.take(7)
    second.commits.drain(second.watch)
    first.take(7)
    first.commits.drain(first.watch)
    check_committed(faulty, 7)


def test_a_part_that_never_comes_is_given_up_with_its_quorum(
    start: Start, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PART_BYTES", 1000)
    monkeypatch.setattr(module, "_PART_GRACE_S", 0.1)
    worker = start(faulty, 0, 2)
    worker.take(7)
    assert worker.commits.newest_step() == 7
    worker.enter(2)
    assert worker.commits.newest_step() == 0, "another may be due at once"
    worker.commits.drain(worker.watch)
    assert not RunLog(faulty, RUN).visible_commits()
    assert "the snapshot of step 7 is given up: a worker that has left had part 1 of it" in caplog.text
    monkeypatch.setattr(module, "_PART_BYTES", 10**9)
    worker.take(8)
    worker.commits.drain(worker.watch)
    check_committed(faulty, 8)


def test_a_writer_that_was_taken_over_is_told_and_another_quorum_is_not(start: Start, faulty: Faulty) -> None:
    worker = start(faulty)
    faulty.may_put.clear()
    worker.take(1)
    claim_incarnation(faulty, RUN, {})
    worker.enter(2)
    worker.take(2)
    faulty.may_put.set()
    with pytest.raises(SupersededError):
        worker.commits.drain(worker.watch)
    assert not RunLog(faulty, RUN).visible_commits()


def test_who_waits_for_a_commit_hears_that_its_quorum_is_over(start: Start, faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of a worker that is lost will never come."""
    monkeypatch.setattr(module, "_PART_BYTES", 1000)
    worker = start(faulty, 0, 2, max_lag_s=0)
    worker.take(7)

    def over() -> None:
        raise QuorumLost("the other one is dead")

    monkeypatch.setattr(worker.watch, "check", over)
    with pytest.raises(QuorumLost, match="the other one is dead"):
        worker.commits.keep_up(worker.watch)
    with pytest.raises(QuorumLost, match="the other one is dead"):
        worker.commits.drain(worker.watch)
