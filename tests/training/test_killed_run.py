"""A whole training run in processes that are killed, on a store that they share: it ends with the bits of one left alone."""

import multiprocessing
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import make_run, prepare_dataset, publish_base, train_here
from tests.training.one_run import train
from tidepool.checkpoint import RunLog, verify
from tidepool.storage import open_store

pytestmark = pytest.mark.chaos
_TIMEOUT_S = 120
_SHAS = ("weights_sha256", "optimizer_sha256", "history_sha256")
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.training.one_run"])


def run_until(store_url: str, run: str, kill_at: tuple[int, str] | None) -> dict[str, Any] | None:
    """Train in a new process; SIGKILL it when it says that it is at a step and phase. Returns its result, None if it was killed."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "TIDEPOOL_"))}
    receiver, sender = _processes.Pipe(duplex=False)
    process = _processes.Process(target=train, args=(store_url, run, environment, sender))
    process.start()
    sender.close()
    result = None
    try:
        while receiver.poll(_TIMEOUT_S):
            said = receiver.recv()
            if said == kill_at:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
            if isinstance(said, dict):
                result = said
    except EOFError:
        pass
    process.join(_TIMEOUT_S)
    assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)
    process.close()
    receiver.close()
    return result


def test_killing_the_process_changes_no_bit_and_loses_no_commit(shared_store_url: str, tmp_path: Path) -> None:
    publish_base(shared_store_url, prepare_dataset(shared_store_url, tmp_path), tmp_path)
    store, run = open_store(shared_store_url), f"r{uuid.uuid4().hex[:8]}"
    alone = train_here(make_run(shared_store_url, f"{run}-alone")).result
    committed = 0
    for kill_at in ((3, "step"), (4, "commit"), (7, "step")):
        assert run_until(shared_store_url, run, kill_at) is None
        visible = RunLog(store, run).visible_commits()
        for commit in visible:
            verify(store, run, commit)
        assert visible[0].step >= committed
        committed = visible[0].step
    assert committed == 6
    result = run_until(shared_store_url, run, None)
    assert alone is not None
    assert result is not None
    assert [result[key] for key in _SHAS] == [alone[key] for key in _SHAS]
