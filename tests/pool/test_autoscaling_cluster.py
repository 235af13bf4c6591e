"""With Ray's own autoscaler: nodes come when runs and traffic want them, of the types that are needed, are left in time, and end.

The nodes are processes of this machine; all the rest is real: runs, Serve, the arbiter, Ray's autoscaler and what it is told.
"""

import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from tests.pool.autoscaling import autoscaling_cluster
from tests.serving.models import publish
from tests.training.conftest import check_exactly_once, make_run, prepare_dataset, publish_base, train_here
from tests.training.jobs import Job, Status, bits, claims
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster
from tidepool.messages import NAMESPACE, ClusterView, Node
from tidepool.pool.cluster import read_cluster
from tidepool.pool.tables import type_of
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, open_store

with warnings.catch_warnings():  # Ray 2.60 declares its models in a way that pydantic 2 is about to drop
    warnings.filterwarnings("ignore", message="Using extra keyword arguments on `Field`", category=DeprecationWarning)
    import ray.serve

pytestmark = [pytest.mark.autoscaling, pytest.mark.timeout(600)]
_TIMEOUT_S = 240
_IDLE_S = 30.0
"""Longer than a replica group takes to start on a busy machine: a node that was launched for one is idle until then."""
_NOTICE_S = 60


def node_type(name: str, cpus: int, market: str, most: int) -> dict[str, Any]:
    resources = {"CPU": cpus, "object_store_memory": 100 * 2**20}
    labels = {"ray.io/node-group": name, "ray.io/market-type": market}
    return {"resources": resources, "labels": labels, "node_config": {}, "min_workers": 0, "max_workers": most}


NODE_TYPES = {
    "large": node_type("large", 4, "on-demand", 1),
    "small": node_type("small", 2, "on-demand", 2),
    "spot": node_type("spot", 2, "spot", 1),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster without any node but its head, to which this process is connected."""
    store_url = (tmp_path_factory.mktemp("cluster") / "store").as_uri()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RAY_worker_niceness", "0")
        with autoscaling_cluster(store_url, NODE_TYPES, _IDLE_S) as running:
            monkeypatch.setenv("RAY_ADDRESS", running.address)
            monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
            ray.init(running.address, namespace=NAMESPACE, log_to_driver=False)
            yield running
            ray.shutdown()


@pytest.fixture(scope="module")
def store(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """The cluster's store, with the dataset `tides` and the model `base`."""
    folder = tmp_path_factory.mktemp("prepared")
    publish_base(cluster.store_url, prepare_dataset(cluster.store_url, folder), folder)
    return open_store(cluster.store_url)


@pytest.fixture(autouse=True)
def seen(cluster: LocalCluster) -> Iterator[Counter[str]]:
    """The most nodes of each type that the test has seen. It begins and ends with none."""
    del cluster
    view_once(is_empty)
    most: Counter[str] = Counter()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            most.update(types_up(read_cluster()) - most)

    thread = threading.Thread(target=watch)
    thread.start()
    yield most
    ended.set()
    thread.join()
    view_once(is_empty)


@pytest.fixture
def start(cluster: LocalCluster, seen: Counter[str], tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts a job that trains by a spec; those that still run at the end of the test are killed."""
    del seen  # which waits for their nodes to end
    jobs: list[Job] = []

    def start(spec: RunSpec, faults: list[dict[str, Any]] | None = None) -> Job:
        jobs.append(Job(cluster, spec, tmp_path, faults=faults))
        return jobs[-1]

    yield start
    for job in jobs:
        job.process.kill()
        job.wait()


def types_up(view: ClusterView) -> Counter[str]:
    return Counter(type_of(node) for node in workers(view))


def workers(view: ClusterView) -> list[Node]:
    return [node for node in view.nodes if node.cpus]


def is_empty(view: ClusterView) -> bool:
    return not workers(view) and not any(template.launching for template in view.templates)


def view_once(condition: Callable[[ClusterView], bool]) -> ClusterView:
    """The view once it meets a condition."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition(view := read_cluster()):
        assert time.monotonic() < deadline, view
        time.sleep(0.2)
    return view


def drain(cluster: LocalCluster, node: str) -> None:
    """Have a node leave as a spot notice does (`tidepool.spot_notice`)."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", f"--deadline-remaining-seconds={_NOTICE_S}"]
    subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)


def node_of(job: Job) -> str:
    """The node of the run's only worker, once it takes steps."""

    def places(status: Status) -> set[str]:
        return {worker["node_id"] for worker in status["workers"] if worker["rank"] is not None}

    return places(job.wait_for_status(lambda status: status["is_stepping"] and len(places(status)) == 1)).pop()


def test_each_run_gets_a_node_of_the_type_that_it_needs_and_none_is_left(
    store: ObjectStore, seen: Counter[str], start: Callable[..., Job]
) -> None:
    wishes = {"spot": ("basic", 2), "small": ("standard", 2), "large": ("standard", 4)}
    jobs = {
        name: start(make_run(store.url, f"on-{name}", pool={"tier": tier}, workers={"cpus_per_worker": cpus}))
        for name, (tier, cpus) in wishes.items()
    }
    for job in jobs.values():
        job.result(store)
    view_once(is_empty)
    assert seen == {"spot": 1, "small": 1, "large": 1}
    with pytest.raises(ValueError, match="AutoscalingCoordinator"):  # of Ray Train's: it would tell the autoscaler something else
        ray.get_actor("AutoscalingCoordinator", "AutoscalingCoordinator")


def test_a_run_leaves_a_node_in_time_and_goes_on_on_another(
    cluster: LocalCluster, store: ObjectStore, start: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path / "cache"))
    spec = make_run(store.url, "moved", workers={"cpus_per_worker": 2}, checkpoint={"every_steps": 4, "max_lag_s": 300})
    job = start(spec, [{"function": "tidepool.training.loop:StepLoop._compute", "step": 5, "do": "wait", "always": True}])
    before = node_of(job)
    drain(cluster, before)
    began = time.monotonic()
    job.wait_for_status(lambda _: "is to leave at the next step" in job.output)
    job.open_gate(5)
    view_once(lambda view: before not in {node.name for node in view.nodes})
    assert time.monotonic() - began < _NOTICE_S  # it ends when nobody is on it, or at its deadline
    result = job.result(store)
    check_exactly_once(store, job.spec)
    assert (result["recomputed_steps"], len(claims(store, "moved"))) == (0, 2)  # from the commit with which its only group left
    assert job.output.count("starting replica group") == 2
    undisturbed = train_here(
        make_run(store.url, "unmoved", workers={"cpus_per_worker": 2}, checkpoint={"every_steps": 4, "max_lag_s": 300})
    ).result
    assert undisturbed is not None
    assert bits(result) == bits(dict(undisturbed))


def test_traffic_brings_a_node_which_is_left_without_a_failed_request_and_ends(
    cluster: LocalCluster, seen: Counter[str], tmp_path: Path
) -> None:
    publish(cluster.store_url, tmp_path, base="asked", adapter="asked-bot")
    scale = {"min": 0, "max": 2, "ttft_s": 20, "up_after_s": 0.5, "down_after_s": 2, "zero_after_s": 8}
    local_cluster.serve(cluster, ["asked"], replicas={"scale": scale, "cpus_per_replica": 2}, engine={"weights": "fp32"})
    assert not workers(read_cluster())

    def ask() -> None:
        body = {"model": "asked", "prompt": "the tide", "max_tokens": 4, "temperature": 0}
        answered = httpx.post(f"{cluster.api_url}/completions", json=body, timeout=_TIMEOUT_S)
        assert answered.status_code == 200, answered.text

    ask()
    [replica] = [one for one in read_cluster().replicas if one.is_alive]
    drain(cluster, replica.node)
    began = time.monotonic()
    while replica.node in {node.name for node in read_cluster().nodes}:
        ask()
        assert time.monotonic() - began < _NOTICE_S
    ask()
    view_once(lambda view: not view.replicas)
    assert not seen["spot"]
