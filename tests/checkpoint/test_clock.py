"""Clocks that disagree: the store's and ours may be years apart, and nothing that was committed goes for it."""

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.checkpoint import Checkpoints, RunLog, claim_incarnation, protocol, verify
from tidepool.errors import StoreError
from tidepool.storage import ObjectStore, local, open_store

STATE = {"model": {"w": torch.zeros(2)}}


def clock(skew: timedelta) -> type:
    class Skewed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Skewed":
            return cls.fromtimestamp((datetime.now(tz) + skew).timestamp(), tz)

    return Skewed


def keys(store: ObjectStore) -> set[str]:
    return {info.key for info in store.list("runs/r/checkpoints/")}


@given(
    skew=st.timedeltas(min_value=timedelta(days=-20_000), max_value=timedelta(days=20_000)),
    closed_steps=st.lists(st.integers(1, 50), max_size=3, unique=True),
    open_steps=st.lists(st.integers(51, 99), max_size=3, unique=True),
    keep=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_clock_says_retention_keeps_what_counts_and_what_is_being_written(
    skew: timedelta, closed_steps: list[int], open_steps: list[int], keep: int
) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    for number, steps in enumerate((closed_steps, open_steps), start=1):
        incarnation = claim_incarnation(store, "r", {})
        writer = Checkpoints(store, "r", incarnation)
        for step in sorted(steps):
            writer.save(step, STATE, {})
        # what a writer has put before its commit, now and when it was killed
        store.put_if_absent(f"runs/r/checkpoints/100/{number}-{'a' * 16}/model.safetensors", b"uncommitted")
    expected = RunLog(store, "r").visible_commits()[:keep]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(protocol, "datetime", clock(skew))
        writer.retain(keep)
    assert RunLog(store, "r").visible_commits() == expected
    for commit in expected:
        verify(store, "r", commit)
    assert f"runs/r/checkpoints/100/2-{'a' * 16}/model.safetensors" in keys(store), "a commit may follow: it is of this incarnation"
    is_gone = f"runs/r/checkpoints/100/1-{'a' * 16}/model.safetensors" not in keys(store)
    assert is_gone == (skew > timedelta(days=1)), "what can never be committed any more goes sooner or later"


def test_a_clock_days_ahead_may_cost_a_local_store_a_write_that_is_under_way_and_no_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary files of a local store go by age too: a writer whose file is taken away gets an error, and puts again."""
    store = open_store(tmp_path.as_uri())
    store.put_if_absent("runs/r/log/1.json", b"{}")
    now, fsync = local.time.time, local.os.fsync

    def opened_meanwhile(descriptor: int) -> None:
        fsync(descriptor)
        monkeypatch.setattr(local.os, "fsync", fsync)
        monkeypatch.setattr(local.time, "time", lambda: now() + 3 * 86_400)
        open_store(tmp_path.as_uri())
        monkeypatch.setattr(local.time, "time", now)

    monkeypatch.setattr(local.os, "fsync", opened_meanwhile)
    with pytest.raises(StoreError):
        store.put_if_absent("runs/r/log/2.json", b"{}")
    assert [info.key for info in store.list("")] == ["runs/r/log/1.json"]
    store.put_if_absent("runs/r/log/2.json", b"{}")
    assert [info.key for info in store.list("")] == ["runs/r/log/1.json", "runs/r/log/2.json"]


def test_modified_at_is_in_utc(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    store.put_if_absent("a", b"x")
    (info,) = store.list("")
    assert abs(datetime.now(UTC) - info.modified_at) < timedelta(minutes=5)
