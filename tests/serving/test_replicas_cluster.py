"""On Ray Serve with two replicas: one that is killed or must go under load costs its clients nothing, with a gateway connected."""

import asyncio
import json
import os
import signal
import time
from typing import Any

import httpx
import psutil
import pytest

from tests.serving.models import Published, publish
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster

pytestmark = pytest.mark.cluster
_TIMEOUT_S = 120
_NUM_STREAMS = 16


@pytest.fixture(scope="module")
def served(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A base and an adapter, served by two replicas."""
    published = publish(cluster.store_url, tmp_path_factory.mktemp("models"), base="pair-tides", adapter="pair-bot", context_length=512)
    scale(cluster, 2)
    return published


def scale(cluster: LocalCluster, num_replicas: int) -> None:
    """Serve with so many replicas; returns when they are there, and no others."""
    replicas = {"num_replicas": num_replicas, "cpus_per_replica": 0.5}
    local_cluster.serve(cluster, ["pair-tides", "pair-bot"], replicas=replicas, engine={"weights": "fp32"})
    wait_for(lambda: len(replica_pids(cluster)) == num_replicas)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def replica_pids(cluster: LocalCluster) -> list[int]:
    """The processes of the engine replicas that run, as Serve tells them."""
    url = f"{cluster.dashboard_url}/api/serve/applications/"
    deployments = httpx.get(url, timeout=_TIMEOUT_S).json()["applications"]["tidepool"]["deployments"]
    replicas = [one for name, deployment in deployments.items() if name.startswith("Engine") for one in deployment["replicas"]]
    return [one["pid"] for one in replicas if one["state"] == "RUNNING" and psutil.pid_exists(one["pid"])]


class Client:
    """Sixteen streams at one time, which count their tokens."""

    def __init__(self, cluster: LocalCluster, **sampling: Any) -> None:
        self._url, self._sampling = f"{cluster.api_url}/completions", sampling
        self.texts = [""] * _NUM_STREAMS
        self.num_events = [0] * _NUM_STREAMS
        self.is_done = [False] * _NUM_STREAMS

    async def until_under_way(self) -> None:
        """Most answers have begun, and most of those are not at their end (a few end by themselves)."""
        async with asyncio.timeout(_TIMEOUT_S):
            while sum(num >= 3 for num in self.num_events) < 12:
                await asyncio.sleep(0.005)
        assert sum(self.is_done) <= 8

    async def all(self) -> list[str]:
        return await self.some(_NUM_STREAMS)

    async def some(self, num: int) -> list[str]:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, limits=httpx.Limits(max_connections=None)) as client:
            await asyncio.gather(*(self._one(client, index) for index in range(num)))
        return self.texts[:num]

    async def _one(self, client: httpx.AsyncClient, index: int) -> None:
        body = {"model": "pair-bot" if index % 2 else "pair-tides", "prompt": f"the tide {index}", "max_tokens": 480, "stream": True}
        async with client.stream("POST", self._url, json=body | self._sampling) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    self.is_done[index] = True
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                self.texts[index] += "".join(choice["text"] for choice in chunk["choices"])
                self.num_events[index] += 1
        assert self.is_done[index]


SAMPLING = {"greedy": {"temperature": 0}, "seeded": {"temperature": 1, "seed": 4}}


@pytest.mark.parametrize("how", ["greedy", "seeded"])
def test_a_replica_that_is_killed_under_sixteen_streams_costs_them_nothing(cluster: LocalCluster, served: Published, how: str) -> None:
    del served
    wait_for(lambda: len(replica_pids(cluster)) == 2)

    async def run() -> None:
        undisturbed = await Client(cluster, **SAMPLING[how]).all()
        assert len(set(undisturbed)) > 8
        victim = replica_pids(cluster)[0]
        client = Client(cluster, **SAMPLING[how])
        asked = asyncio.create_task(client.all())
        await client.until_under_way()
        os.kill(victim, signal.SIGKILL)
        assert await asked == undisturbed

    asyncio.run(run())


def test_a_replica_that_must_go_under_sixteen_streams_cuts_none_and_an_idle_gateway_holds_none_up(
    cluster: LocalCluster, served: Published
) -> None:
    del served
    wait_for(lambda: len(replica_pids(cluster)) == 2)

    async def run() -> None:
        undisturbed = await Client(cluster, temperature=0).all()
        client = Client(cluster, temperature=0)
        asked = asyncio.create_task(client.all())
        await client.until_under_way()
        await asyncio.to_thread(scale, cluster, 1)
        assert await asked == undisturbed
        assert await Client(cluster, temperature=0).all() == undisturbed

    asyncio.run(run())
