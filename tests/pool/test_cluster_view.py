"""What is read of a real cluster: nodes, what is free on them, Serve's replicas, runs."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.training.nodes import second_node
from tidepool.local_cluster import LocalCluster
from tidepool.messages import NAMESPACE, ClusterView, ReplicaActor, Resources
from tidepool.pool.cluster import read_cluster

with warnings.catch_warnings():  # Ray 2.60 declares its models in a way that pydantic 2 is about to drop
    warnings.filterwarnings("ignore", message="Using extra keyword arguments on `Field`", category=DeprecationWarning)
    from ray import serve

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
_TIMEOUT_S = 120
_CALL_S = 0.25
"""A read in this time does not keep the arbiter, which reads twice a second, from anything. It takes 3 ms on two busy cores."""


class Idle:
    """An actor, or a replica, that does nothing."""

    def ready(self) -> None:
        return


def view_once(condition: Callable[[ClusterView], bool]) -> ClusterView:
    """The view once it meets a condition."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition(view := read_cluster()):
        assert time.monotonic() < deadline, view
        time.sleep(0.1)
    return view


@pytest.fixture
def application(cluster: LocalCluster) -> Iterator[None]:
    """One replica of a CPU that runs, and one that finds no room."""
    del cluster
    serve.shutdown()  # what tests before this one have served
    serve.start(proxy_location="Disabled")
    small = serve.deployment(name="small", ray_actor_options={"num_cpus": 1})(Idle)
    huge = serve.deployment(name="huge", ray_actor_options={"num_cpus": 99})(Idle)
    free = serve.deployment(name="free", ray_actor_options={"num_cpus": 0})(Idle)
    for name, one in {"small": small, "huge": huge, "free": free}.items():
        serve._run(one.bind(), name=f"view-{name}", route_prefix=None, _blocking=False)
    yield
    serve.shutdown()


@pytest.mark.long
@pytest.mark.usefixtures("application")
def test_replicas_are_seen_where_they_run_and_while_they_pend() -> None:
    def is_settled(view: ClusterView) -> bool:
        return {(one.deployment, one.is_alive) for one in view.replicas} == {("small", True), ("huge", False)}

    view = view_once(is_settled)
    [node] = view.nodes
    by_name = {one.deployment: one for one in view.replicas}
    small, huge = by_name["small"], by_name["huge"]
    assert small == ReplicaActor("view-small", "small", small.name, node.name, True, Resources(0, 1))
    assert huge == ReplicaActor("view-huge", "huge", huge.name, "", False, Resources(0, 99))
    assert small.name.startswith("SERVE_REPLICA::view-small#small#")
    view_once(lambda view: view.free[node.name] == Resources(0, node.cpus - 1))
    serve.delete("view-small")
    serve.delete("view-huge")
    view_once(lambda view: not view.replicas and view.free[node.name] == Resources(0, node.cpus))


def test_runs_are_those_with_a_living_coordinator(cluster: LocalCluster) -> None:
    del cluster
    other = ray.remote(num_cpus=0)(Idle).options(name="tidepool-run-elsewhere", namespace="elsewhere").remote()
    actor = ray.remote(num_cpus=0)(Idle).options(name="tidepool-run-here", namespace=NAMESPACE).remote()
    ray.get([actor.ready.remote(), other.ready.remote()])
    assert {run for run in read_cluster().runs if "here" in run} == {"here"}
    ray.kill(actor)
    view_once(lambda view: "here" not in view.runs)
    ray.kill(other)


def test_a_node_is_seen_from_its_start_to_its_end(cluster: LocalCluster) -> None:
    [head] = read_cluster().nodes
    assert (head.kind, head.gpus, head.leaves_at_s, head.is_spot) == ("cpu", 0, None, False)
    with second_node(cluster, num_cpus=2) as node:
        view = view_once(lambda view: len(view.nodes) == 2)
        [second] = [one for one in view.nodes if one.name != head.name]
        assert (second.kind, second.cpus, view.free[second.name]) == ("cpu", 2, Resources(0, 2))
        here = NodeAffinitySchedulingStrategy(second.name, soft=False)
        busy = ray.remote(num_cpus=1)(Idle).options(scheduling_strategy=here).remote()  # a node that nobody is on ends at once
        view_once(lambda view: view.free[second.name] == Resources(0, 1))
        node.drain(cluster, second.name)
        view = view_once(lambda view: not view.free[second.name].cpus)
        [leaves_at_s] = [one.leaves_at_s for one in view.nodes if one.name == second.name]
        assert leaves_at_s is not None
        assert timedelta(seconds=60) < timedelta(seconds=leaves_at_s - time.time()) <= timedelta(seconds=120)
        ray.kill(busy)
        view_once(lambda view: len(view.nodes) == 1)


def test_reading_is_quick(cluster: LocalCluster, record_property: Callable[[str, object], None]) -> None:
    del cluster
    taken = []
    for _ in range(30):
        began = time.perf_counter()
        read_cluster()
        taken.append(time.perf_counter() - began)
    record_property("read_cluster_s", statistics.median(taken))
    assert statistics.median(taken) < _CALL_S, taken
