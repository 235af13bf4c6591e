"""The commit protocol on a store: whole or absent whatever dies when, verified, fought over, cleaned up."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tidepool.checkpoint import Checkpoints, Commit, Incarnation, RunLog, claim_incarnation, read_manifest, verify
from tidepool.errors import CorruptCheckpointError, StoreError, SupersededError
from tidepool.storage import ObjectStore, log_numbers, open_store

RUN = "r"


@pytest.fixture
def store(store_url: str) -> ObjectStore:
    return open_store(store_url)


def state(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((300,), float(step)), "b": torch.tensor(step)}, "optimizer": {"m": torch.arange(5) * step}}


def start(store: ObjectStore) -> tuple[Checkpoints, Incarnation]:
    incarnation = claim_incarnation(store, RUN, {"by": "test"})
    return Checkpoints(store, RUN, incarnation), incarnation


def test_what_was_committed_comes_back(any_store_url: str) -> None:
    store = open_store(any_store_url)
    checkpoints, first = start(store)
    assert first == Incarnation(1, None)
    commit = checkpoints.save(10, state(10), {"dataset": "d@1"})
    again, second = start(open_store(any_store_url))
    assert second == Incarnation(2, commit)
    for name, tensors in state(10).items():
        restored = again.restore(commit, name)
        assert restored.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(restored[key], tensor)
            assert restored[key].dtype == tensor.dtype
    manifest = read_manifest(store, RUN, commit)
    assert (manifest["step"], manifest["dataset"], manifest["incarnation"]) == (10, "d@1", 1)


class _Dying:
    """A store whose n-th call from now raises, before or after it did its work; later ones too."""

    def __init__(self, store: ObjectStore, calls: int, after: bool) -> None:
        self._store, self._left, self._after = store, calls, after
        self.url = store.url

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._left -= 1
            if self._left < 0 and not (self._after and self._left == -1):
                raise StoreError("dead")
            result = getattr(self._store, name)(*arguments)
            result = list(result) if name == "list" else result
            if self._left < 0:
                raise StoreError("dead")
            return result

        return call


@pytest.mark.parametrize("after", [False, True])
def test_a_writer_that_dies_at_any_call_leaves_the_commit_before_or_a_whole_one(store: ObjectStore, after: bool) -> None:
    checkpoints, incarnation = start(store)
    before = checkpoints.save(1, state(1), {})
    deaths, whole = 0, 0
    for calls in range(60):
        dying = Checkpoints(_Dying(store, calls, after), RUN, incarnation)
        try:
            dying.save(2, state(2), {})
            dying.retain(5)
        except StoreError:
            deaths += 1
        else:
            break
        found = start(store)[1].base
        assert found is not None
        verify(store, RUN, found)
        assert found == before or found.step == 2
        whole += found.step == 2
        # Back to where it was, for the next death.
        for number in log_numbers(store, f"runs/{RUN}/log/")[2:]:
            store.delete(f"runs/{RUN}/log/{number}.json")
    assert deaths > 6
    assert 0 < whole < deaths


def test_a_commit_whose_answer_was_lost_is_known_as_done(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, _ = start(store)
    put = store.put_if_absent

    def lose_answer(key: str, data: bytes | Path) -> None:
        put(key, data)
        if "/log/" in key:
            raise StoreError("no answer")

    monkeypatch.setattr(store, "put_if_absent", lose_answer)
    commit = checkpoints.save(3, state(3), {})
    assert start(store)[1].base == commit


def damage(store: ObjectStore, commit: Commit, name: str, content: bytes | None) -> None:
    key = next(info.key for info in store.list(f"runs/{RUN}/checkpoints/{commit.step}/") if info.key.endswith(f"/{name}"))
    whole = store.get(key)
    store.delete(key)
    if content is not None:
        store.put_if_absent(key, content or whole[:-1] + bytes([whole[-1] ^ 1]))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("content", [None, b"", b"short", b'{"step": 2}'])
def test_a_damaged_checkpoint_is_passed_over(
    store: ObjectStore, name: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, _ = start(store)
    good, bad = checkpoints.save(1, state(1), {}), checkpoints.save(2, state(2), {})
    damage(store, bad, name, content)
    again, incarnation = start(store)
    assert incarnation.base == good
    assert "falling back to the commit before: Checkpoint" in caplog.text
    with pytest.raises(CorruptCheckpointError, match="of run r cannot be used"):
        verify(store, RUN, bad)
    assert again.save(2, state(2), {}).incarnation == incarnation.number
    assert start(store)[1].base is not None


def test_restoring_checks_what_it_reads(store: ObjectStore) -> None:
    checkpoints, _ = start(store)
    commit = checkpoints.save(1, state(1), {})
    damage(store, commit, "model.safetensors", b"")
    with pytest.raises(CorruptCheckpointError, match="sha256 differs"):
        checkpoints.restore(commit, "model")
    with pytest.raises(CorruptCheckpointError, match=r"names no history\.safetensors"):
        checkpoints.restore(commit, "history")


def test_a_writer_that_was_overtaken_cannot_commit(store: ObjectStore) -> None:
    old, _ = start(store)
    kept = old.save(1, state(1), {})
    new, incarnation = start(store)
    with pytest.raises(SupersededError, match="incarnation 2 is newer than this one"):
        old.save(2, state(2), {})
    assert incarnation.base == kept
    assert start(store)[1].base == kept
    del new


def test_a_writer_that_is_overtaken_while_it_commits_is_told(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = start(store)
    first = old.save(1, state(1), {})
    put = store.put_if_absent

    def overtake(key: str, data: bytes | Path) -> None:
        if "/log/" in key:
            monkeypatch.undo()
            start(store)
        put(key, data)

    monkeypatch.setattr(store, "put_if_absent", overtake)
    with pytest.raises(SupersededError):
        old.save(2, state(2), {})
    assert start(store)[1].base == first, "what the overtaken one wrote counts for nobody"


def test_a_commit_between_look_and_claim_is_not_lost(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = start(store)
    put, made = store.put_if_absent, []

    def commit_first(key: str, data: bytes | Path) -> None:
        if "/log/" in key:
            monkeypatch.undo()
            made.append(old.save(7, state(7), {}))
        put(key, data)

    monkeypatch.setattr(store, "put_if_absent", commit_first)
    assert start(store)[1].base == made[0]


@pytest.mark.parametrize("entry", ["claim", "commit"])
def test_an_entry_that_comes_so_late_that_its_number_was_removed_counts_for_nobody(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    """The number that a stalled driver chose is taken by a commit, and free again once retention has removed that."""
    old, _ = start(store)
    put, made = store.put_if_absent, list[Commit]()

    def others_go_first(key: str, data: bytes | Path) -> None:
        if "/log/" not in key:
            put(key, data)
            return
        monkeypatch.undo()
        if entry == "commit":
            put(key, data)  # it stands, but the answer is lost
        writer = old if entry == "claim" else start(store)[0]
        made.extend(writer.save(step, state(step), {}) for step in (11, 12, 13))
        writer.retain(1)
        put(key, data)  # its number is free again

    monkeypatch.setattr(store, "put_if_absent", others_go_first)
    if entry == "claim":
        assert start(store)[1] == Incarnation(2, made[-1])
    else:
        with pytest.raises(SupersededError):
            old.save(7, state(7), {})
    assert RunLog(store, RUN).visible_commits() == made[2:]
    assert start(store)[1].base == made[-1]


def test_drivers_that_start_at_once_get_different_incarnations(any_store_url: str) -> None:
    store = open_store(any_store_url)
    commit = start(store)[0].save(1, state(1), {})
    claimed: list[Incarnation] = []
    barrier = threading.Barrier(3)

    def claim() -> None:
        barrier.wait()
        claimed.append(claim_incarnation(store, RUN, {}))

    threads = [threading.Thread(target=claim) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.number for one in claimed) == [2, 3, 4]
    assert {one.base for one in claimed} == {commit}


def test_retention_keeps_the_newest_and_removes_commits_before_data(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, _ = start(store)
    commits = [checkpoints.save(step, state(step), {}) for step in range(1, 6)]
    deleted: list[str] = []
    delete = store.delete
    monkeypatch.setattr(store, "delete", lambda key: (deleted.append(key), delete(key)))
    assert sorted(checkpoints.retain(2)) == sorted(commits[:3])
    assert all(key.startswith(f"runs/{RUN}/log/") for key in deleted[:3])
    for commit in commits[:3]:
        assert len([key for key in deleted[3:] if commit.attempt in key]) == 3
    checkpoints.save(6, state(6), {})
    checkpoints.retain(2)
    assert log_numbers(store, f"runs/{RUN}/log/") == [1, 6, 8, 9], "a claim, two commits and the newest removal are left"
    commits = [*commits[:4], *RunLog(store, RUN).visible_commits()]
    assert [commit.step for commit in commits] == [1, 2, 3, 4, 6, 5]
    for commit in commits[4:]:
        verify(store, RUN, commit)


def test_only_old_attempts_of_closed_incarnations_are_garbage(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = start(store)
    dying = Checkpoints(_Dying(store, 4, False), RUN, first)
    with pytest.raises(StoreError):
        dying.save(1, state(1), {})
    second, _ = start(store)
    garbage = [info.key for info in store.list(f"runs/{RUN}/checkpoints/")]
    assert garbage
    kept = second.save(2, state(2), {})
    second.retain(1)
    assert set(garbage) <= {info.key for info in store.list(f"runs/{RUN}/checkpoints/")}, "it is young: its writer may live"

    from tidepool.checkpoint import protocol

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz or UTC) + timedelta(days=2)

    monkeypatch.setattr(protocol, "datetime", Later)
    second.retain(1)
    assert not set(garbage) & {info.key for info in store.list(f"runs/{RUN}/checkpoints/")}
    verify(store, RUN, kept)
