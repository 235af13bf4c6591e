"""What the driver remembers of its replica groups, and where they start on a cluster."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import ray
import ray._private.state
from ray.core.generated import gcs_pb2

from tests.training.conftest import make_run
from tidepool.local_cluster import LocalCluster
from tidepool.training import replica_groups
from tidepool.training.replica_groups import ReplicaGroup, ReplicaGroups
from tidepool.training.standby import RUNTIME_ENV
from tidepool.training.task import Pins, Task

_TIMEOUT_S = 180


def test_a_group_that_has_come_is_not_pending_for_a_coordinator_that_has_heard_nobody_yet() -> None:
    groups = ReplicaGroups(lambda _: None, cast(Any, None))
    groups.running = {number: ReplicaGroup(number, "", (), cast(Any, None), cast(Any, None), 0.0) for number in (1, 2)}
    groups.note_come(frozenset({1, 7}))
    groups.note_come(frozenset())  # another coordinator
    assert [group.number for group in groups.pending()] == [2]


@pytest.mark.cluster
@pytest.mark.long
def test_a_group_that_comes_where_one_has_left_finds_a_process_that_waited(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_groups, "_SETTLE_S", 0.0)
    free, here = ray.available_resources()["CPU"], ((ray.get_runtime_context().get_node_id(), 1),)
    groups = ReplicaGroups(told_of(tmp_path), Task(make_run(cluster.store_url, "standby"), Pins("tides", None, None), 1))
    try:
        groups.start("first", here)
        first = int(wait_for(lambda: read(tmp_path / "1")))
        assert actors_of_this_job() == ["Launcher", "RayTrainWorker"], "each actor is a process that takes seconds to start"
        groups.note_come({1})
        groups.stand_by(2)
        assert list(waiting(first)) == [], "where nobody has left nobody waits"
        groups.end(1)
        groups.stand_by(0)
        groups.stand_by(1)
        [second] = wait_for(lambda: list(waiting(first)))
        groups.stand_by(1)
        groups.start("second", here)
        assert int(wait_for(lambda: read(tmp_path / "2"))) == second
    finally:
        groups.close()
        wait_for(lambda: groups.wait(0.1) == [] and ray.available_resources().get("CPU", 0) >= free)


def told_of(folder: Path) -> Callable[[Mapping[str, Any]], None]:
    """A worker that writes its process down, and waits."""

    def work(config: Mapping[str, Any]) -> None:
        (folder / "new").write_text(str(os.getpid()))
        (folder / "new").rename(folder / str(config["group"]))
        threading.Event().wait()

    return work


def actors_of_this_job() -> list[str]:
    """The classes of those that live, or are to, but for the one of the dashboard's page."""
    accessor, job = ray._private.state.state._connect_and_get_accessor(), ray.get_runtime_context().get_job_id()
    actors = map(gcs_pb2.ActorTableData.FromString, accessor.get_actor_table(ray.JobID.from_hex(job), None))
    dead = gcs_pb2.ActorTableData.ActorState.DEAD
    return sorted({actor.class_name.rpartition(".")[2] for actor in actors if actor.state != dead} - {"TrainStateActor"})


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def waiting(*others: int) -> Iterator[int]:
    """The processes that began as those of workers, but for these, and have imported torch."""
    for process in psutil.process_iter(["pid", "environ"]):
        is_worker = RUNTIME_ENV["env_vars"].items() <= (process.info["environ"] or {}).items() and process.pid not in others
        with suppress(psutil.NoSuchProcess):
            if is_worker and any("libtorch" in part.path for part in process.memory_maps()):
                yield process.pid


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + _TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found
