"""On Ray Serve: a model goes to no replica while nobody asks, a request waits for the first one, and traffic brings another."""

import asyncio
import time
from collections.abc import Callable

import httpx
import psutil
import pytest

from tests.serving.models import Published, publish
from tests.serving.test_replicas_cluster import Client, replica_pids
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.long]
_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def served(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A base and an adapter that begin with no replica."""
    published = publish(cluster.store_url, tmp_path_factory.mktemp("models"), base="pair-tides", adapter="pair-bot", context_length=512)
    scale = {"min": 0, "max": 2, "ttft_s": 20, "up_after_s": 0.5, "down_after_s": 2, "zero_after_s": 4}
    replicas = {"scale": scale, "cpus_per_replica": 0.5}
    local_cluster.serve(cluster, ["pair-tides", "pair-bot"], replicas=replicas, engine={"weights": "fp32", "max_batch_size": 4})
    return published


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ask(cluster: LocalCluster) -> httpx.Response:
    body = {"model": "pair-bot", "prompt": "the tide", "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{cluster.api_url}/completions", json=body, timeout=_TIMEOUT_S)


def test_a_model_without_replicas_answers_who_waits_and_goes_to_none_again(cluster: LocalCluster, served: Published) -> None:
    del served
    for _ in range(2):
        wait_for(lambda: not replica_pids(cluster, ("STARTING", "RUNNING", "STOPPING")))
        answered = ask(cluster)
        assert answered.status_code == 200, answered.text
        wait_for(lambda: bool(replica_pids(cluster)))  # Serve says so later than it answers
        [pid] = replica_pids(cluster)
        wait_for(lambda pid=pid: not psutil.pid_exists(pid))  # the gateway is connected all the time


def test_traffic_brings_another_replica_and_its_going_cuts_no_stream(cluster: LocalCluster, served: Published) -> None:
    async def run() -> None:
        undisturbed = await Client(cluster, served, temperature=0).all()
        most = 0
        deadline = time.monotonic() + _TIMEOUT_S
        while most < 2:
            assert time.monotonic() < deadline
            asked = asyncio.create_task(Client(cluster, served, temperature=0).all())
            while not asked.done():
                most = max(most, len(await asyncio.to_thread(replica_pids, cluster)))
                await asyncio.sleep(0.2)
            assert await asked == undisturbed
        deadline = time.monotonic() + _TIMEOUT_S
        while len(await asyncio.to_thread(replica_pids, cluster)) == 2:
            assert time.monotonic() < deadline
            light = Client(cluster, served, temperature=0, max_tokens=480)
            assert await light.some(1) == undisturbed[:1]

    asyncio.run(run())
