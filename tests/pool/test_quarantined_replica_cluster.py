"""A replica of Serve's on a node that goes into quarantine moves, its streams with it, and none comes to that node before it returns."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import ray
import ray._private.state
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.serving.models import publish
from tests.serving.test_replicas_cluster import Client
from tests.training.nodes import ADDRESS, second_node
from tidepool import local_cluster
from tidepool.arbiter_handle import find_arbiter
from tidepool.local_cluster import LocalCluster
from tidepool.pool import inspection
from tidepool.pool.cluster import read_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]
_TIMEOUT_S = 240
_QUARANTINE_S = 20


def test_a_replica_leaves_a_quarantined_node_with_its_streams_and_none_comes_before_it_returns(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    published = publish(cluster.store_url, tmp_path / "models", base="pair-tides", adapter="pair-bot", context_length=512)
    with second_node(cluster, num_cpus=2):
        [head] = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] != ADDRESS]
        [other] = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == ADDRESS]
        wait_for(lambda: free_cpus(other) == 2)
        with all_taken(head):
            local_cluster.serve(cluster, ["pair-tides", "pair-bot"], replicas={"cpus_per_replica": 1}, engine={"weights": "fp32"})
            wait_for(lambda: places() == {other})

        async def run() -> None:
            undisturbed = await Client(cluster, published, temperature=0).all()
            client = Client(cluster, published, temperature=0)
            asked = asyncio.create_task(client.all())
            await client.until_under_way()
            await asyncio.to_thread(quarantine, other)
            assert await asked == undisturbed

        asyncio.run(run())
        wait_for(lambda: free_cpus(other) == 0)
        wait_for(lambda: places() == {head})
        wait_for(lambda: free_cpus(other) == 2)  # it has passed its check
        assert places() == {head}
        httpx.delete(f"{cluster.dashboard_url}/api/serve/applications/", timeout=_TIMEOUT_S).raise_for_status()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, (places(), ray.util.placement_group_table())
        time.sleep(0.1)


def free_cpus(node: str) -> float:
    return float(ray._private.state.available_resources_per_node().get(node, {}).get("CPU", 0))


def places() -> set[str]:
    """The nodes of the replicas that live."""
    return {replica.node for replica in read_cluster().replicas if replica.is_alive}


@contextmanager
def all_taken(node: str) -> Iterator[None]:
    """Nobody finds a CPU on this node meanwhile."""

    @ray.remote
    class Holder:
        def ping(self) -> None: ...

    options = {"num_cpus": free_cpus(node), "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
    holder = Holder.options(**options).remote()
    ray.get(holder.ping.remote())
    yield
    ray.kill(holder)


def quarantine(node: str) -> None:
    """As if an arbiter had found it, and died."""
    arbiter = find_arbiter()
    ray.get(arbiter.pid.remote())
    stored = _internal_kv_get(inspection._KEY, namespace=inspection._KV_NAMESPACE)
    known = json.loads(stored) if stored else {}
    why = {"kind": "deaths", "why": "the test says so", "since_s": time.time(), "until_s": time.time() + _QUARANTINE_S}
    known[node] = {"num_quarantines": 1, "returned_s": 0.0, "quarantine": why}
    _internal_kv_put(inspection._KEY, json.dumps(known).encode(), overwrite=True, namespace=inspection._KV_NAMESPACE)
    ray.kill(arbiter, no_restart=False)
