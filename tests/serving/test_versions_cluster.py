"""On Ray Serve: new versions of a whole model take over from the ones before while they are asked, without anybody deploying anything, and
what was computed for one version is never taken for another one's.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from tests.serving.models import Published, publish, publish_adapter, publish_base
from tidepool import local_cluster
from tidepool.announcement import announce
from tidepool.cli import main
from tidepool.inference.engine import EngineStats
from tidepool.local_cluster import LocalCluster
from tidepool.registry import ModelVersion, Registry
from tidepool.serving.bases import base_id
from tidepool.serving.engines import engines_of
from tidepool.storage import open_store

pytestmark = [pytest.mark.cluster, pytest.mark.long]
_TIMEOUT_S = 120
_PROMPTS = [f"the tide comes in and the pool fills {index}" for index in range(3)]
_BUSY_MACHINE_S = 3.0
"""What the two seconds of the promise may take where tests share two cores."""


@pytest.fixture(scope="module")
def served(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A whole model and an adapter on its first version, served by a replica."""
    published = publish(cluster.store_url, tmp_path_factory.mktemp("models"), base="whole-tides", adapter="whole-bot", context_length=512)
    replicas = {"num_replicas": 1, "cpus_per_replica": 0.5}
    local_cluster.serve(cluster, ["whole-tides", "whole-bot"], replicas=replicas, engine={"weights": "fp32"}, resolve_ttl_s=600)
    return published


def wait_for(condition: Callable[[], bool], timeout_s: float = _TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def applications(cluster: LocalCluster) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{cluster.dashboard_url}/api/serve/applications/", timeout=_TIMEOUT_S).json()["applications"]
    return found


def base_of(version: ModelVersion) -> str:
    """The name of the Serve application of a whole model."""
    return engines_of("tidepool", base_id(version.digest))[0]


def deployed(cluster: LocalCluster) -> set[str]:
    return {name for name in applications(cluster) if name.startswith("tidepool-")}


def num_running(cluster: LocalCluster, version: ModelVersion) -> int:
    deployments = applications(cluster).get(base_of(version), {"deployments": {}})["deployments"].values()
    return sum(replica["state"] == "RUNNING" for one in deployments for replica in one["replicas"])


@dataclass
class Traffic:
    """Clients that ask one model again and again, each answer with the version that gave it; `failures` of any kind."""

    cluster: LocalCluster
    model: str
    answers: list[tuple[float, str, str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, client: httpx.AsyncClient, prompt: str, num_tokens: int = 12) -> tuple[float, str, str, str]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
        answered = await client.post(f"{self.cluster.api_url}/completions", json=body)
        if answered.status_code != 200:
            self.failures.append(answered.text)
            return time.monotonic(), "", prompt, ""
        value = answered.json()
        return time.monotonic(), value["system_fingerprint"].rpartition("-")[0], prompt, value["choices"][0]["text"]

    async def go_on(self, client: httpx.AsyncClient, prompt: str) -> None:
        while not self.is_over.is_set():
            self.answers.append(await self.ask(client, prompt))

    async def until_answered_by(self, ref: str) -> float:
        async with asyncio.timeout(_TIMEOUT_S):
            while not (found := [at for at, by, _, _ in self.answers if by == ref]):
                await asyncio.sleep(0.02)
        return min(found)


async def until(condition: Callable[[], bool]) -> float:
    async with asyncio.timeout(_TIMEOUT_S):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)
    return time.monotonic()


def test_whole_models_take_over_under_load_and_the_one_before_goes_when_it_is_done(
    cluster: LocalCluster, served: Published, tmp_path: Path
) -> None:
    first = served.base

    async def run() -> None:
        traffic = Traffic(cluster, "whole-tides")
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, limits=httpx.Limits(max_connections=None)) as client:
            alone = {(first.ref, prompt): (await traffic.ask(client, prompt))[3] for prompt in _PROMPTS}
            asked = [asyncio.create_task(traffic.go_on(client, prompt)) for prompt in _PROMPTS * 2]
            second = await asyncio.to_thread(publish_base, served, tmp_path / "second", "whole-tides", 2)
            await asyncio.to_thread(announce, "whole-tides")
            directory = applications(cluster)["tidepool"]["deployments"]["Directory"]["replicas"][0]["pid"]
            await until(lambda: base_of(second) in deployed(cluster))
            os.kill(directory, signal.SIGKILL)  # whoever comes after it finds what it left half done
            running_at = await until(lambda: num_running(cluster, second) > 0)
            answered_at = await traffic.until_answered_by(second.ref)
            assert answered_at - running_at < _BUSY_MACHINE_S + 3  # a directory that starts anew hears of replicas every three seconds
            third = await asyncio.to_thread(publish_base, served, tmp_path / "third", "whole-tides", 3)
            await asyncio.to_thread(announce, "whole-tides")
            running_at = await until(lambda: num_running(cluster, third) > 0)
            assert await traffic.until_answered_by(third.ref) - running_at < _BUSY_MACHINE_S
            traffic.is_over.set()
            await asyncio.gather(*asked)
            assert traffic.failures == []
            after = {(third.ref, prompt): (await traffic.ask(client, prompt))[3] for prompt in _PROMPTS}
            assert (
                await asyncio.to_thread(main, ["models", "rollback", "whole-tides", "--store", cluster.store_url]) == 0
            )  # which tells of it
            while (await traffic.ask(client, _PROMPTS[0]))[1] != second.ref:
                await asyncio.sleep(0.05)
            alone |= after | {(second.ref, prompt): (await traffic.ask(client, prompt))[3] for prompt in _PROMPTS}
            assert len(set(alone.values())) > 2 * len(_PROMPTS), "versions differ"
            assert [one for one in traffic.answers if one[3] != alone[one[1], one[2]]] == [], "no answer is mixed"
            assert {by for _, by, _, _ in traffic.answers} == {first.ref, second.ref, third.ref}
            assert traffic.failures == []
        await until(lambda: deployed(cluster) == {base_of(first), base_of(second)})  # the adapter is served on the first one

    asyncio.run(run())


def test_a_whole_model_that_cannot_be_loaded_never_answers_and_disturbs_nobody(
    cluster: LocalCluster, served: Published, tmp_path: Path
) -> None:
    del served
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"no tensors")
    (folder / "config.json").write_text("{}")
    registry = Registry(open_store(cluster.store_url))

    async def run() -> None:
        traffic = Traffic(cluster, "whole-tides")
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            before = await traffic.ask(client, _PROMPTS[0])
            asked = asyncio.create_task(traffic.go_on(client, _PROMPTS[0]))
            broken = await asyncio.to_thread(registry.publish, "whole-tides", "full", folder, lineage={}, metrics={})
            await asyncio.to_thread(announce, "whole-tides")
            await until(lambda: applications(cluster).get(base_of(broken), {}).get("status") in ("DEPLOY_FAILED", "UNHEALTHY"))
            traffic.is_over.set()
            await asked
            assert traffic.failures == []
            assert {one[1:] for one in traffic.answers} == {before[1:]}
            await asyncio.to_thread(registry.rollback, "whole-tides")
            await asyncio.to_thread(announce, "whole-tides")
            await until(lambda: base_of(broken) not in deployed(cluster))

    asyncio.run(run())


def test_nothing_that_was_computed_for_one_version_is_taken_for_another_one(
    cluster: LocalCluster, served: Published, tmp_path: Path
) -> None:
    engine = serve.get_deployment_handle(engines_of("tidepool", base_id(served.base.digest))[1], base_of(served.base))
    prompt = "the tide comes in and the pool fills; " * 8

    def ask(model: str) -> tuple[int, str]:
        """How often the beginning of a prompt was found in the cache for this request, and who answered."""
        before: EngineStats = engine.counters.remote().result(timeout_s=_TIMEOUT_S)
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
        answered = httpx.post(f"{cluster.api_url}/completions", json=body, timeout=_TIMEOUT_S)
        assert answered.status_code == 200, answered.text
        after: EngineStats = engine.counters.remote().result(timeout_s=_TIMEOUT_S)
        return after.num_prefix_hits - before.num_prefix_hits, answered.json()["system_fingerprint"].rpartition("-")[0]

    assert [ask("whole-bot"), ask("whole-bot")] == [(0, "whole-bot@1"), (1, "whole-bot@1")]
    second = publish_adapter(served, tmp_path / "next", "whole-bot", seed=9)
    announce("whole-bot")
    answered = [ask("whole-bot")]
    while answered[-1][1] != second.ref:
        assert len(answered) < 500
        answered.append(ask("whole-bot"))
    assert [hits for hits, by in answered if by == "whole-bot@1"] == [1] * (len(answered) - 1)
    assert answered[-1] == (0, second.ref), "the same words under the same name"
    assert ask("whole-bot") == (1, second.ref)
    assert ask("whole-bot@1") == (1, "whole-bot@1"), "its own are still there"


def test_the_deployments_of_the_models_go_with_the_application(cluster: LocalCluster, served: Published) -> None:
    del served
    assert deployed(cluster)
    serve.delete("tidepool")
    wait_for(lambda: not deployed(cluster))
