"""Checks on the nodes of a real cluster: what they answer, and what becomes of those that lie, hang or are called off."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_del

from tests.training.nodes import ADDRESS, second_node
from tidepool.local_cluster import LocalCluster
from tidepool.messages import ClusterView, Node, Resources
from tidepool.pool import inspection
from tidepool.pool.health import Rules
from tidepool.pool.inspection import Inspector

pytestmark = pytest.mark.cluster
TIMEOUT_S = 180


@pytest.fixture(autouse=True)
def _own_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test has remembered is its own."""
    monkeypatch.setattr(inspection, "_KEY", f"tidepool-health-{uuid.uuid4().hex}".encode())
    yield
    _internal_kv_del(inspection._KEY, namespace=inspection._KV_NAMESPACE)


def look() -> ClusterView:
    """The nodes that are up, on all of which everything is free."""
    up = [node for node in ray.nodes() if node["Alive"]]
    nodes = tuple(Node(node["NodeID"], "cpu", 0, int(node["Resources"].get("CPU", 0))) for node in up)
    return ClusterView(nodes, {node.name: Resources(0, node.cpus) for node in nodes})


def wait_for(inspector: Inspector, condition: Callable[[], bool], used: frozenset[str] = frozenset()) -> None:
    """Inspect the cluster until the condition holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, (inspector.quarantined(), inspector.unchecked())
        inspector.step(look(), used, (), time.time())
        time.sleep(0.1)


def running_checks() -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if "tidepool.pool.checks" in (one.info["cmdline"] or [])]


@pytest.mark.usefixtures("cluster")
def test_a_node_is_checked_and_that_is_remembered() -> None:
    inspector = Inspector()
    inspector.step(look(), frozenset(), (), time.time())
    assert inspector.unchecked() == {node.name for node in look().nodes}
    wait_for(inspector, lambda: not inspector.unchecked())
    assert inspector.quarantined() == {}
    anew = Inspector()
    anew.step(look(), frozenset(), (), time.time())
    assert anew.unchecked() == frozenset()


@contextmanager
def node_that(lie: str, cluster: LocalCluster, folder: Path) -> Iterator[str]:
    """A second node whose checks do this; gives its id."""
    (folder / "sitecustomize.py").write_text(f"import os, sys, threading\nif 'tidepool.pool.checks' in sys.orig_argv:\n    {lie}\n")
    with second_node(cluster, num_cpus=1, packages=folder):
        [other] = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == ADDRESS]
        yield other


HANG = "threading.Event().wait()"


def test_a_check_is_called_off_where_somebody_comes(cluster: LocalCluster, tmp_path: Path) -> None:
    inspector = Inspector()
    with node_that(HANG, cluster, tmp_path) as other:
        wait_for(inspector, lambda: bool(running_checks()) and inspector.unchecked() == {other})
        wait_for(inspector, lambda: not running_checks(), used=frozenset({other}))
    assert inspector.quarantined() == {}


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        ("print('[]'); sys.stdout.flush(); os._exit(0)", "it answered nonsense"),
        ("os._exit(7)", "RuntimeError: the process of the check ended with 7"),
        pytest.param(HANG, "it did not end in 20 s", marks=pytest.mark.long),
    ],
)
def test_a_node_whose_check_lies_is_quarantined_and_no_other(cluster: LocalCluster, tmp_path: Path, lie: str, why: str) -> None:
    inspector = Inspector(Rules(retry_s=0.5, deadline_s=20.0 if lie == HANG else 60.0))
    with node_that(lie, cluster, tmp_path) as other:
        wait_for(inspector, lambda: bool(inspector.quarantined()) and not inspector.unchecked())
        assert inspector.quarantined() == {other: f"its check failed 2 times: {why}"}
        wait_for(inspector, lambda: not running_checks())
