"""Ray's own doors, on loopback: TLS between two nodes, and the token without which nobody asks for anything."""

import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import make_certificate
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster

pytestmark = pytest.mark.cluster
TIMEOUT_S = 120
# A task on each node; the second one takes an object that the first one made, which is too large to travel with the call.
_DRIVER = """
import json, sys
import ray
ray.init(sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=0)
def make():
    return ray.get_runtime_context().get_node_id(), bytes(2**22)

@ray.remote(num_cpus=0)
def take(made):
    return ray.get_runtime_context().get_node_id(), len(made[1])

made = make.options(resources={"first": 1}).remote()
node, size = ray.get(take.options(resources={"second": 1}).remote(made), timeout=60)
print(json.dumps([ray.get(made, timeout=60)[0] != node, size]))
"""


def drive(cluster: LocalCluster, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run the driver with a changed environment; None takes a variable away."""
    changed = {**cluster.environment, **variables}
    environment = {name: value for name, value in changed.items() if value is not None}
    command = [sys.executable, "-W", "ignore", "-c", _DRIVER, cluster.address]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def add_node(cluster: LocalCluster, log: Path, resource: str) -> "subprocess.Popen[bytes]":
    """A node more, on the same address; it is ended with the cluster, whose folder stands in its processes' command lines."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={cluster.address}", "--node-ip-address=127.0.0.1"]
    command += ["--block", "--num-cpus=1", "--num-gpus=0", "--object-store-memory=200000000", f'--resources={{"{resource}": 1}}']
    command += ["--disable-usage-stats"]
    variables = cluster.environment | {"TMPDIR": cluster.temp_dir}
    with log.open("wb") as output:
        return subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


@pytest.fixture
def tls_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """Two nodes with certificates, which can do nothing but by TLS."""
    (tmp_path / "ours").mkdir()
    certificate = make_certificate(tmp_path / "ours")
    for name, value in tls_variables(certificate.path, certificate.key_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = local_cluster.start((tmp_path / "store").as_uri(), num_cpus=1, log=tmp_path / "ray.log")
    nodes = []
    try:
        nodes += [add_node(cluster, tmp_path / f"{resource}.log", resource) for resource in ("first", "second")]
        yield cluster
    finally:
        local_cluster.stop(cluster)
        for node in nodes:
            node.terminate()
            node.wait(TIMEOUT_S)


def tls_variables(certificate: Path, key: Path) -> dict[str, str]:
    files = {"RAY_TLS_SERVER_CERT": certificate, "RAY_TLS_SERVER_KEY": key, "RAY_TLS_CA_CERT": certificate}
    return {"RAY_USE_TLS": "1"} | {name: str(path) for name, path in files.items()}


@pytest.mark.slow
def test_nodes_talk_by_tls_and_to_nobody_without_a_certificate(tls_cluster: LocalCluster, tmp_path: Path) -> None:
    done = drive(tls_cluster)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, 2**22], "an object went from node to node"
    plain = drive(tls_cluster, RAY_USE_TLS="0")
    assert plain.returncode != 0, "without TLS nobody is answered"
    (tmp_path / "theirs").mkdir()
    foreign = make_certificate(tmp_path / "theirs")
    stranger = drive(tls_cluster, **tls_variables(foreign.path, foreign.key_path))
    assert stranger.returncode != 0, "a certificate that the nodes do not trust opens nothing"


@pytest.mark.slow
def test_nobody_without_the_token_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = local_cluster.start((tmp_path / "store").as_uri(), num_cpus=1, log=tmp_path / "ray.log")
    try:
        jobs = urllib.request.Request(f"{cluster.dashboard_url}/api/jobs/")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(jobs, timeout=30)
        assert refused.value.code in (401, 403)
        refused.value.close()
        jobs.add_header("Authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(jobs, timeout=30) as response:
            assert json.loads(response.read()) == []
        for variables in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": None}):
            assert drive(cluster, **variables).returncode != 0
    finally:
        local_cluster.stop(cluster)
