"""The pool's promise in small, on a real Ray cluster of four slots: serving takes a slot from training and gives it back, nobody notices.

The run waits in a long step while that happens, so that a group must leave in the middle of it; the arbiter is killed in between.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray.exceptions import RayError

from tests.serving.models import Published, publish
from tests.serving.test_replicas_cluster import Client, replica_pids
from tests.training.conftest import check_exactly_once, make_run, prepare_dataset, publish_base, train_here
from tests.training.jobs import Job, Status, bits
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster
from tidepool.messages import ARBITER, NAMESPACE
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, open_store

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.long, pytest.mark.timeout(900)]
_TIMEOUT_S = 300
STEPS, GATE_STEP = 150, 5
GATE: dict[str, Any] = {"function": "tidepool.training.loop:StepLoop._compute", "step": GATE_STEP, "do": "wait", "always": True}
ALL = {"STARTING", "RUNNING", "STOPPING"}


@pytest.fixture(scope="module")
def store(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """The cluster's store, with the dataset `tides` and the model `base`."""
    folder = tmp_path_factory.mktemp("prepared")
    publish_base(cluster.store_url, prepare_dataset(cluster.store_url, folder), folder)
    return open_store(cluster.store_url)


@pytest.fixture
def served(cluster: LocalCluster, tmp_path: Path) -> Iterator[Published]:
    """A base and an adapter, with a replica of one slot that traffic makes two of."""
    published = publish(cluster.store_url, tmp_path / "models", base="pair-tides", adapter="pair-bot", context_length=512)
    scale = {"min": 1, "max": 2, "ttft_s": 20, "up_after_s": 0.5, "down_after_s": 4}
    replicas = {"scale": scale, "cpus_per_replica": 1}
    local_cluster.serve(cluster, ["pair-tides", "pair-bot"], replicas=replicas, engine={"weights": "fp32", "max_batch_size": 4})
    yield published
    httpx.delete(f"{cluster.dashboard_url}/api/serve/applications/", timeout=_TIMEOUT_S).raise_for_status()


@pytest.fixture
def job(cluster: LocalCluster, store: ObjectStore, tmp_path: Path) -> Iterator[Job]:
    """A run that takes what is left, and waits at a step."""
    job = Job(cluster, pooled_run(store, "pooled"), tmp_path, faults=[GATE | {"step": 1}, GATE])
    yield job
    if job.process.poll() is None:
        job.process.kill()
        job.wait()


def pooled_run(store: ObjectStore, run: str) -> RunSpec:
    training = {"steps": STEPS, "num_shards": 12, "global_batch_size": 12, "evaluate_every_steps": 50}
    return make_run(store.url, run, training=training, elastic={"min": 1, "max": 4}, checkpoint={"every_steps": 20, "max_lag_s": 300})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def loaded(number: int, step: int = GATE_STEP) -> Callable[[Status], bool]:
    """So many workers are there, and each takes the step that all wait in, or waits to join."""

    def is_so(status: Status) -> bool:
        there = [worker for worker in status["workers"] if worker["phase"] != "gone"]
        return len(there) == number and all(worker["phase"] == "wait" or worker["step"] == step for worker in there)

    return is_so


def arbiter_pid() -> int | None:
    try:
        pid: int = ray.get(ray.get_actor(ARBITER, NAMESPACE).pid.remote(), timeout=_TIMEOUT_S)
    except (ValueError, RayError):
        return None
    return pid


def kill_arbiter() -> None:
    before = arbiter_pid()
    assert before is not None
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: arbiter_pid() not in {None, before})


def test_serving_takes_a_slot_and_gives_it_back_and_neither_costs_a_request_or_a_bit(
    cluster: LocalCluster, store: ObjectStore, served: Published, job: Job
) -> None:
    def client() -> Client:
        return Client(cluster, served, temperature=0, max_tokens=120)

    wait_for(lambda: len(replica_pids(cluster)) == 1)
    job.wait_for_status(loaded(3, step=1))
    job.open_gate(1)  # so that all three hold the state when one must go
    job.wait_for_status(lambda status: len(status["groups"]) == 3 and all(one["step"] == GATE_STEP for one in status["workers"]))
    texts = asyncio.run(client().some(6))

    async def ask_until(condition: Callable[[], bool]) -> None:
        """Streams all the time, each of which must be answered, and as it was before."""
        is_over = asyncio.Event()

        async def ask_on() -> None:
            while not is_over.is_set():
                assert await client().some(6) == texts

        asking = [asyncio.create_task(ask_on()) for _ in range(3)]
        deadline = time.monotonic() + _TIMEOUT_S
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < deadline
            assert not any(one.done() for one in asking)
            await asyncio.sleep(0.1)
        is_over.set()
        await asyncio.gather(*asking)

    asyncio.run(ask_until(lambda: len(replica_pids(cluster)) == 2))
    job.wait_for_status(loaded(2))
    kill_arbiter()
    assert asyncio.run(client().some(6)) == texts
    wait_for(lambda: len(replica_pids(cluster, ALL)) == 1)
    job.wait_for_status(loaded(3))
    job.open_gate(GATE_STEP)
    job.wait_for_status(lambda status: status["is_stepping"] and status["step"] > GATE_STEP and len(status["groups"]) == 3)
    result = job.result(store)
    assert "is to leave" in job.output
    expected = train_here(pooled_run(store, "pooled-alone")).result
    assert expected is not None
    assert bits(result) == bits(dict(expected)), job.output
    check_exactly_once(store, job.spec)
