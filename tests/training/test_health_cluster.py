"""Nodes that make runs suffer: a worker that is throttled, one that dies again and again. On a real cluster with its arbiter.

The second node is quarantined, vacated, checked again and used again; the run goes on elsewhere, with the bits of one that was left alone.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.training.conftest import make_run, prepare_dataset, publish_base, train_here
from tests.training.jobs import Job, Status, bits
from tests.training.nodes import ADDRESS, second_node
from tests.training.test_elastic_cluster import GATE, gather
from tests.training.throttling import throttled
from tidepool.local_cluster import LocalCluster
from tidepool.messages import ARBITER, NAMESPACE
from tidepool.pool.arbiter import Arbiter
from tidepool.pool.health import Rules
from tidepool.storage import ObjectStore, open_store

pytestmark = [pytest.mark.elastic, pytest.mark.chaos, pytest.mark.timeout(900)]
TIMEOUT_S = 280
STEPS, LAST_GATE = 300, 260
TRAINING = {"steps": STEPS, "num_shards": 6, "global_batch_size": 12, "evaluate_every_steps": 150}
HOLD_S = 10.0
Start = Callable[..., tuple[Job, Status]]


@pytest.fixture(scope="module")
def store(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    folder = tmp_path_factory.mktemp("prepared")
    publish_base(cluster.store_url, prepare_dataset(cluster.store_url, folder), folder)
    return open_store(cluster.store_url)


@pytest.fixture
def arbiter(cluster: LocalCluster) -> Iterator[Any]:  # noqa: ARG001 - it is there
    """An arbiter whose quarantines are short."""
    _end_arbiter()
    options = {"name": ARBITER, "namespace": NAMESPACE, "lifetime": "detached"}
    yield ray.remote(num_cpus=0, max_restarts=-1)(Arbiter).options(**options).remote(Rules(hold_s=HOLD_S, idle_s=2.0))
    _end_arbiter()


def _end_arbiter() -> None:
    try:
        ray.kill(ray.get_actor(ARBITER, NAMESPACE))
    except ValueError:
        return  # there is none
    deadline = time.monotonic() + TIMEOUT_S
    while any(actor["name"] == ARBITER for actor in ray.util.list_named_actors(all_namespaces=True)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def start(cluster: LocalCluster, store: ObjectStore, tmp_path: Path) -> Iterator[Start]:
    """Starts a run and waits until it takes steps with three groups of two CPUs each: two fit on the head, and one on the second node."""
    jobs: list[Job] = []

    def start(run: str, steps: int = STEPS) -> tuple[Job, Status]:
        gates = [dict(GATE), *([GATE | {"step": LAST_GATE}] if steps == STEPS else [])]
        jobs.append(Job(cluster, a_run(store, run, steps), tmp_path, faults=gates))
        return jobs[-1], gather(jobs[-1])

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def a_run(store: ObjectStore, run: str, steps: int = STEPS) -> Any:
    rest: dict[str, Any] = {"elastic": {"min": 1, "max": 3}, "workers": {"cpus_per_worker": 2}}
    return make_run(
        store.url, run, training=TRAINING | {"steps": steps}, checkpoint={"every_steps": 100, "keep": 3, "max_lag_s": 300}, **rest
    )


def second_id() -> str:
    [node] = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == ADDRESS]
    return str(node)


def wait_until(condition: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert job.process.poll() is None, job.output
        assert time.monotonic() < deadline, job.output
        time.sleep(0.1)


def quarantine(arbiter: Any) -> dict[str, str]:
    """Why nodes are in quarantine, as the arbiter decided on it last."""
    nodes = ray.get(arbiter.snapshot.remote())["nodes"]
    return {node["name"]: node["quarantine"] for node in nodes if node.get("quarantine")}


def worker_on(status: Status, node: str) -> dict[str, Any] | None:
    """The run's worker on a node, if there is one."""
    return next((worker for worker in status["workers"] if worker["node_id"] == node), None)


def is_slow(worker: dict[str, Any] | None) -> bool:
    return worker is not None and worker["score"] is not None and worker["score"] < 0.7


def test_the_node_of_a_throttled_worker_is_vacated_and_comes_back(
    cluster: LocalCluster, store: ObjectStore, arbiter: Any, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path / "cache"))
    alone = train_here(a_run(store, "health-alone")).result
    assert alone is not None
    with second_node(cluster, num_cpus=2):
        node = second_id()
        job, status = start("health-straggler")
        assert quarantine(arbiter) == {}
        worker = worker_on(status, node)
        assert worker is not None
        with throttled(worker["pid"]):
            job.wait_for_status(lambda status: is_slow(worker_on(status, node)))
            wait_until(lambda: node in quarantine(arbiter), job)
            expected = f"worker {worker['group']}.0 of run health-straggler has long computed at 0."
            assert quarantine(arbiter)[node].startswith(expected)
            job.wait_for_status(lambda status: status["is_stepping"] and worker_on(status, node) is None)
        wait_until(lambda: node not in quarantine(arbiter), job)
        job.wait_for_status(lambda status: worker_on(status, node) is not None)
        job.open_gate(LAST_GATE)
        assert bits(job.result(store)) == bits(dict(alone))
        assert f"is in quarantine: {expected}" in job.output


def test_a_node_where_workers_die_again_and_again_is_vacated(cluster: LocalCluster, arbiter: Any, start: Start) -> None:
    with second_node(cluster, num_cpus=2):
        node = second_id()
        job, _ = start("health-deaths", steps=100_000)
        killed: set[int] = set()

        def another(status: Status) -> bool:
            worker = worker_on(status, node)
            return worker is not None and worker["pid"] not in killed and worker["rank"] is not None and worker["step"] > 0

        for _ in range(3):
            assert node not in quarantine(arbiter)
            worker = worker_on(job.wait_for_status(another), node)
            assert worker is not None
            killed.add(worker["pid"])
            os.kill(worker["pid"], signal.SIGKILL)
        wait_until(lambda: quarantine(arbiter).get(node) == "3 worker processes died on it within 60 minutes", job)
        job.wait_for_status(lambda status: status["is_stepping"] and worker_on(status, node) is None)
        job.process.terminate()
        assert job.wait() == 143, job.output
