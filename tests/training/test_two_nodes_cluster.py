"""How the library reaches the workers, on two nodes: the second one has nothing of ours but the dependencies.

The decision: `ray job submit --working-dir .` brings the repository to the driver, the driver ships the library it runs
from to its workers (`py_modules`). The environment of these tests has the library installed too, so that the test looks
at where each worker's copy lies.
"""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray._raylet import GcsClient

import tidepool
from tests.metadata import Metadata
from tests.training.conftest import make_run, prepare_dataset, publish_base
from tests.training.nodes import end, second_node
from tidepool import local_cluster
from tidepool.checkpoint import RunLog
from tidepool.local_cluster import LocalCluster
from tidepool.storage import open_store
from tidepool.training.outcome import read_result

pytestmark = [pytest.mark.cluster, pytest.mark.long]
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240
RUN = "two-nodes"

# In a process of its own: this one may be connected to the session's cluster.
WATCH = """
import json, sys, time, ray
address, name, num_workers, timeout_s = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
ray.init(address, namespace="tidepool", logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + timeout_s
while time.monotonic() < deadline:
    try:
        workers = ray.get(ray.get_actor(name).status.remote())["workers"]
    except (ValueError, ray.exceptions.RayActorError):
        workers = []
    if len(workers) == num_workers and min(worker["step"] for worker in workers) >= 1:
        print(json.dumps({"workers": workers, "nodes": ray.nodes()}))
        break
    time.sleep(0.05)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """A head with room for one worker; metrics leave the workers every second."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path / "head-cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    running = local_cluster.start((tmp_path / "store").as_uri(), num_cpus=1, log=tmp_path / "head.log")
    try:
        yield running
    finally:
        local_cluster.stop(running)


def submit(cluster: LocalCluster, spec: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--"]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, "python", "jobs/train.py", str(spec)], cwd=ROOT, env=cluster.environment, stdout=output, stderr=subprocess.STDOUT
        )


def nodes(cluster: LocalCluster) -> dict[str, dict[str, Any]]:
    """The cluster's nodes by address."""
    with urllib.request.urlopen(f"{cluster.dashboard_url}/api/v0/nodes?detail=1", timeout=30) as answer:
        listed = json.loads(answer.read())["data"]["result"]["result"]
    return {node["node_ip"]: node for node in listed}


def watch(cluster: LocalCluster, num_workers: int) -> dict[str, Any]:
    """The run's heartbeats once all workers have taken a step, and the cluster's nodes."""
    command = [sys.executable, "-c", WATCH, cluster.address, f"tidepool-run-{RUN}", str(num_workers), str(TIMEOUT_S)]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=TIMEOUT_S + 60, check=True)
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def exported(nodes: list[dict[str, Any]], name: str) -> list[str]:
    """The lines of a metric at all nodes' export endpoints."""
    lines = []
    for node in nodes:
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            lines += [line for line in answer.read().decode().splitlines() if re.match(rf"(ray_)?{name}\b", line)]
    return lines


def test_a_submitted_run_uses_its_own_library_on_every_node_and_its_metrics_reach_ray(cluster: LocalCluster, tmp_path: Path) -> None:
    publish_base(cluster.store_url, prepare_dataset(cluster.store_url, tmp_path / "prepared"), tmp_path / "prepared")
    training = {"steps": 200, "evaluate_every_steps": 200}
    spec = make_run(cluster.store_url, RUN, training=training, workers={"num_workers": 2}, checkpoint={"every_steps": 100})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    log = tmp_path / "job.log"
    with second_node(cluster, num_cpus=1) as node:
        second = node.folder
        job = submit(cluster, tmp_path / "run.yaml", log)
        try:
            seen = watch(cluster, num_workers=2)
            deadline = time.monotonic() + TIMEOUT_S
            while not (lines := exported(seen["nodes"], "tidepool_train_loss")):
                assert job.poll() is None, "the run ended before its metrics were seen\n" + log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert job.wait(TIMEOUT_S) == 0, log.read_text()
        finally:
            end(job)
    result = read_result(open_store(cluster.store_url), RUN)
    assert result is not None
    assert result["steps"] == 200

    (second_id,) = (node["NodeID"] for node in seen["nodes"] if node["NodeManagerAddress"] == "127.0.0.2")
    on_second = [worker["node_id"] == second_id for worker in seen["workers"]]
    assert sorted(on_second) == [False, True]
    for worker, is_on_second in zip(seen["workers"], on_second, strict=True):
        library = Path(worker["library"])
        folder = second if is_on_second else Path(cluster.temp_dir)
        assert library.is_relative_to(folder), "the shipped copy, unpacked on the worker's own node"
        assert library.name == "tidepool"
        assert library != Path(tidepool.__path__[0])

    assert any(f'run="{RUN}"' in line for line in lines), lines
    assert all(float(line.rpartition(" ")[2]) > 0 for line in lines), lines

    local_cluster.stop(cluster)
    assert not Path(cluster.temp_dir).exists()
    assert not [one for one in psutil.process_iter(["cmdline"]) if cluster.temp_dir in " ".join(one.info["cmdline"] or [])]


def test_a_node_with_other_software_is_named_and_a_spot_notice_drains_one(
    cluster: LocalCluster, tmp_path: Path, metadata: Metadata
) -> None:
    publish_base(cluster.store_url, prepare_dataset(cluster.store_url, tmp_path / "prepared"), tmp_path / "prepared")
    spec = make_run(cluster.store_url, RUN, workers={"num_workers": 3})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    other = tmp_path / "packages" / "peft-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    with second_node(cluster, num_cpus=2, packages=tmp_path / "packages"):
        node_id = nodes(cluster)["127.0.0.2"]["node_id"]
        job = submit(cluster, tmp_path / "run.yaml", tmp_path / "job.log")
        try:
            assert job.wait(TIMEOUT_S) == 1
        finally:
            end(job)
        output = (tmp_path / "job.log").read_text()
        assert f"error: Node 127.0.0.2 ({node_id}) has other software than the driver's node; driver -> node:\n" in output
        assert re.search(r"^  peft: \d+\.\d+\.\d+ -> 0\.0\.1$", output, re.MULTILINE)
        assert RunLog(open_store(cluster.store_url), RUN).newest_incarnation() == 1, "nobody started the workers again"

        metadata.notice = json.dumps({"action": "terminate", "time": "2199-01-01T00:00:00Z"})
        command = [sys.executable, "-m", "tidepool.spot_notice", f"--address={cluster.address}", f"--node-id={node_id}"]
        environment = cluster.environment | {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stderr
        draining = GcsClient(address=cluster.address).get_draining_nodes()
        is_draining = {id.hex() if hasattr(id, "hex") else id for id in draining} == {node_id}
        assert is_draining or nodes(cluster)["127.0.0.2"]["state"] == "DEAD", "Ray ends a node that drains as soon as it is idle"
