"""On Ray Serve with two replicas: one that is killed or must go under load costs its clients nothing, with a gateway connected, and
versions that are published meanwhile answer whole.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.serving.models import Published, publish, publish_adapter
from tidepool import local_cluster
from tidepool.announcement import announce
from tidepool.local_cluster import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.long]
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


def replica_pids(cluster: LocalCluster, states: Collection[str] = ("RUNNING",)) -> list[int]:
    """The processes of the engine replicas in these states, as Serve tells them."""
    applications = httpx.get(f"{cluster.dashboard_url}/api/serve/applications/", timeout=_TIMEOUT_S).json()["applications"]
    deployments = [
        one for name, application in applications.items() if name.startswith("tidepool-") for one in application["deployments"].values()
    ]
    replicas = [replica for deployment in deployments for replica in deployment["replicas"]]
    pids = [one["pid"] for one in replicas if one["state"] in states and "pid" in one]
    return [pid for pid in pids if psutil.pid_exists(pid)]


class Client:
    """Sixteen streams at one time, none of which ends before its last token, and which count their tokens."""

    def __init__(self, cluster: LocalCluster, served: Published, **sampling: Any) -> None:
        endless = {"logit_bias": {str(served.tokenizer.eos_token_id): -100}}
        self._url, self._sampling = f"{cluster.api_url}/completions", endless | sampling
        self.texts = [""] * _NUM_STREAMS
        self.num_events = [0] * _NUM_STREAMS
        self.is_done = [False] * _NUM_STREAMS

    async def until_under_way(self) -> None:
        """The first answers have begun, and not all are at their end: a busy machine shows them late."""
        async with asyncio.timeout(_TIMEOUT_S):
            while not any(self.num_events):
                await asyncio.sleep(0.005)
        assert sum(self.is_done) <= _NUM_STREAMS - 4

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
    wait_for(lambda: len(replica_pids(cluster)) == 2)

    async def run() -> None:
        undisturbed = await Client(cluster, served, **SAMPLING[how]).all()
        assert len(set(undisturbed)) > 8
        victim = replica_pids(cluster)[0]
        client = Client(cluster, served, **SAMPLING[how])
        asked = asyncio.create_task(client.all())
        await client.until_under_way()
        os.kill(victim, signal.SIGKILL)
        assert await asked == undisturbed

    asyncio.run(run())


def test_a_replica_that_must_go_under_sixteen_streams_cuts_none_and_an_idle_gateway_holds_none_up(
    cluster: LocalCluster, served: Published
) -> None:
    wait_for(lambda: len(replica_pids(cluster)) == 2)

    async def run() -> None:
        undisturbed = await Client(cluster, served, temperature=0).all()
        client = Client(cluster, served, temperature=0)
        asked = asyncio.create_task(client.all())
        await client.until_under_way()
        await asyncio.to_thread(scale, cluster, 1)
        assert await asked == undisturbed
        assert await Client(cluster, served, temperature=0).all() == undisturbed

    asyncio.run(run())


def test_versions_that_are_published_under_load_answer_soon_fail_nobody_and_are_never_mixed(
    cluster: LocalCluster, served: Published, tmp_path: Path
) -> None:
    scale(cluster, 2)
    prompts = [f"the tide {index}" for index in range(4)]
    answers: list[tuple[str, str, str]] = []
    newest = "pair-bot@1"

    async def ask(client: httpx.AsyncClient, model: str, prompt: str) -> tuple[str, str, str]:
        body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        answered = await client.post(f"{cluster.api_url}/completions", json=body)
        assert answered.status_code == 200, answered.text
        value = answered.json()
        return value["system_fingerprint"].rpartition("-")[0], prompt, value["choices"][0]["text"]

    async def ask_on(client: httpx.AsyncClient, prompt: str, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            answers.append(await ask(client, "pair-bot", prompt))

    async def run() -> None:
        nonlocal newest
        is_over = asyncio.Event()
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, limits=httpx.Limits(max_connections=None)) as client:
            clients = [asyncio.create_task(ask_on(client, prompt, is_over)) for prompt in prompts * 2]
            for seed in range(1, 5):
                version = await asyncio.to_thread(publish_adapter, served, tmp_path / str(seed), "pair-bot", seed)
                newest = version.ref
                await asyncio.to_thread(announce, version.name)
                deadline = time.monotonic() + _TIMEOUT_S
                while not any(ref == newest for ref, _, _ in answers):
                    assert time.monotonic() < deadline
                    assert not any(task.done() for task in clients)
                    await asyncio.sleep(0.02)
            is_over.set()
            await asyncio.gather(*clients)
            assert len({ref for ref, _, _ in answers}) == 5
            alone = {(ref, prompt): (await ask(client, ref, prompt))[2] for ref in {ref for ref, _, _ in answers} for prompt in prompts}
            assert len(set(alone.values())) > len(prompts), "versions differ"
            assert [one for one in answers if one[2] != alone[one[:2]]] == []

    asyncio.run(run())
